//! Whether a model with other homes of its experts is still the same: logits of a few texts with both.

use occult_comm::{Buffer, Communicator};
use occult_model::{
    Batch, Decoder, Logits, MAX_PLACEMENT_DIFFERENCE, ModelError, RoutingRecord, logit_difference,
};
use occult_plan::ExpertId;

use super::{MoeModel, decoder, failed};
use crate::error::{Result, TrainError};
use crate::random::{key, mix};

/// Short texts of each rank. Rounding decides a router's choice now and then: at most one text in so many, over all ranks, may
/// differ for that.
const TEXTS: usize = 8;
const TEXT_LEN: usize = 8;
/// Most that the logits of such a text may differ, as a share of their range: another choice of one of 3 or 4 experts changes
/// those of the test models by up to 0.06. Where it does more, a placement is refused that would be right, which harms nobody.
const MAX_CHOICE_DIFFERENCE: f32 = 0.1;

/// What a model made of a text.
struct Seen {
    logits: Vec<f32>,
    /// Experts of every token in every MoE layer, ascending.
    choices: Vec<ExpertId>,
}

/// How the texts of a rank, or of all ranks, compare.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Compared {
    /// Texts whose logits differ by more than rounding can explain.
    wrong: f64,
    /// Texts that differ no more than another choice of a router can explain, and have one.
    excused: f64,
    /// Largest difference of a text.
    worst: f64,
}

impl Compared {
    fn of(before: &[Seen], after: &[Seen]) -> Self {
        let mut all = Self { wrong: 0.0, excused: 0.0, worst: 0.0 };
        for (old, new) in before.iter().zip(after) {
            let by = logit_difference(&old.logits, &new.logits);
            if by > MAX_PLACEMENT_DIFFERENCE {
                let excused = by <= MAX_CHOICE_DIFFERENCE && old.choices != new.choices;
                *(if excused { &mut all.excused } else { &mut all.wrong }) += 1.0;
            }
            all.worst = all.worst.max(f64::from(by));
        }
        all
    }

    /// Of all ranks (collective).
    fn over_ranks(self, comm: &dyn Communicator) -> Result<Self> {
        let mine = Buffer::from_slice(&[self.wrong, self.excused, self.worst]);
        let all = comm.all_gather("logits that differ", mine);
        let all = all.map_err(|e| TrainError::model("comparing logits", e))?;
        let parts = all.iter().filter_map(|b| b.try_as_slice::<f64>()?.first_chunk::<3>());
        Ok(parts.fold(Self { wrong: 0.0, excused: 0.0, worst: 0.0 }, |sum, [wrong, excused, worst]| Self {
            wrong: sum.wrong + wrong,
            excused: sum.excused + excused,
            worst: sum.worst.max(*worst),
        }))
    }

    /// Why it is not the same model, if so; of `texts` of all ranks.
    fn refusal(self, texts: usize) -> Option<String> {
        let Self { wrong, excused, worst } = self;
        (wrong > 0.0 || excused * TEXTS as f64 > texts as f64).then(|| {
            format!(
                "logits of {} of {texts} texts differ by more than {MAX_PLACEMENT_DIFFERENCE:.0e} of their range, \
                 the worst by {worst:.1e}",
                wrong + excused
            )
        })
    }
}

impl MoeModel {
    /// Why `new` does not compute what this model does: the same answer on every rank (collective). Nothing that is NaN or
    /// infinite passes.
    pub(super) fn differs_from(&self, new: &MoeModel) -> Result<Option<String>> {
        let compared = Compared::of(&self.probe()?, &new.probe()?);
        let comm = self.ranks.comm();
        Ok(compared.over_ranks(&**comm)?.refusal(TEXTS * comm.world_size()))
    }

    /// Runs the texts, of random tokens, without a limit (collective). Also with weights that are no numbers: all ranks come
    /// to the end.
    fn probe(&self) -> Result<Vec<Seen>> {
        let Self { parameters, threads, ranks, bias, choices, .. } = self;
        let model: Decoder = decoder(parameters, threads, ranks, None, bias.as_deref(), choices, true)?;
        let spec = parameters.spec();
        let (len, top_k) = (TEXT_LEN.min(spec.context_len), spec.moe.router.top_k.max(1));
        let see = |text: usize| {
            let id = |i: usize| {
                let seed = key(&[ranks.comm().rank() as u64, text as u64, i as u64]);
                (mix(seed) % spec.vocab_size as u64) as u32
            };
            let tokens: Vec<u32> = (0..len).map(id).collect();
            let batch = Batch::single(&tokens).map_err(failed("a batch for the self-check"))?;
            let mut choices = vec![];
            let mut observe = |record: &RoutingRecord<'_>| {
                choices.extend_from_slice(&record.routing.expert_ids);
                Ok(())
            };
            let logits = match model.forward(&batch, None, Logits::All, Some(&mut observe)) {
                // One rank without a placement's limit has no layers of its own that could go on.
                Err(ModelError::RouterLogit { .. }) => vec![f32::NAN],
                logits => {
                    let logits = logits.map_err(failed("self-check"))?;
                    let values = logits.flatten_all().and_then(|t| t.to_vec1::<f32>());
                    values.map_err(|e| TrainError::model("self-check", e))?
                }
            };
            choices.chunks_mut(top_k).for_each(<[_]>::sort_unstable);
            Ok(Seen { logits, choices })
        };
        (0..TEXTS).map(see).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use occult_comm::SoloComm;

    fn seen(logits: [f32; 3], choice: ExpertId) -> Seen {
        Seen { logits: logits.into(), choices: vec![choice] }
    }

    /// The refusal where one of 8 texts becomes `after`, and another `also`.
    fn refusal(after: Seen, also: Option<Seen>) -> Option<String> {
        let before: Vec<Seen> = (0..TEXTS).map(|_| seen([-1.0, 0.0, 1.0], 3)).collect();
        let mut new: Vec<Seen> = (0..TEXTS).map(|_| seen([-1.0, 1e-5, 1.0], 3)).collect();
        new[2] = after;
        if let Some(also) = also {
            new[5] = also;
        }
        Compared::of(&before, &new).over_ranks(&SoloComm::new()).expect("alone").refusal(TEXTS)
    }

    #[test]
    fn one_text_may_differ_where_a_router_chose_otherwise_but_not_without_limit() {
        let other = || seen([-1.0, 0.18, 1.0], 4);
        assert_eq!(refusal(other(), None), None);
        let two = refusal(other(), Some(other())).expect("two texts of eight");
        assert!(two.starts_with("logits of 2 of 8 texts differ by more than 2e-4"), "{two}");
        assert!(refusal(seen([-1.0, 0.18, 1.0], 3), None).is_some(), "no choice differs");
        let far = refusal(seen([-1.0, 0.6, 1.0], 4), None).expect("too far for a choice");
        assert!(far.ends_with("the worst by 3.0e-1"), "{far}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(refusal(seen([-1.0, bad, 1.0], 4), None).is_some(), "{bad}");
        }
    }
}
