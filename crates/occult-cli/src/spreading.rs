//! Models of the commands that run one: in this process alone, or with their experts over ranks.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use occult_comm::{Communicator, Meter, Metered};
use occult_formats::{Columns, LimitFile, PlacementFile, Profile, read_similarity};
use occult_model::{Decoder, LoadOptions, ModelSpec, Ranks, Spread, Threads};
use occult_moe::{LayerOptions, Mode, Pruning, topology_of};
use occult_plan::placement::{Method, contiguous};
use occult_plan::prune::check_limit;
use occult_plan::{Placement, SimilarityTable, Topology};

use crate::args::{AdaptiveArgs, PruneRule, SearchArgs};
use crate::exit::Usage;
use crate::model_args::LoadArgs;
use crate::overlap::OverlapArgs;
use crate::placing::{LayerInput, Placer};
use crate::tokens::{self, Holdout};
use crate::world::{WorldArgs, needs_ranks, refuse_mpirun, run_world};
use crate::{model, parallel, progress, pruning, setup};

/// What travels between ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeArg {
    /// One row per token and expert, as other frameworks do: to compare with
    Conventional,
    /// One row per token and rank
    #[default]
    Dedup,
}

/// Experts over ranks.
#[derive(Debug, Args)]
pub(crate) struct SpreadArgs {
    #[command(flatten)]
    pub(crate) world: WorldArgs,
    /// Which rank holds which expert (`occult place`) [default: what the model was tuned with, else equal runs]
    #[arg(long, value_name = "PLACEMENT", conflicts_with = "place_by")]
    placement: Option<PathBuf>,
    /// Routing profile to compute a placement from
    #[arg(long, value_name = "PROFILE")]
    place_by: Option<PathBuf>,
    /// What travels between ranks
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    mode: ModeArg,
    #[command(flatten)]
    overlap: OverlapArgs,
    /// Most ranks a token may visit [default: what the model was tuned with, else all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    max_ranks: Option<u16>,
    /// How ranks and replacements are chosen [default: what the model was tuned with, else best-mass]
    #[arg(long, value_enum, requires = "max_ranks")]
    rule: Option<PruneRule>,
    #[command(flatten)]
    adaptive: AdaptiveArgs,
    /// For --rule similarity: a routing profile with router logits to compare experts by [default: what the model was
    /// tuned with]
    #[arg(long, value_name = "PROFILE", requires = "max_ranks")]
    similar_by: Option<PathBuf>,
}

/// Where the experts of a model are, and what counts the bytes between their ranks.
pub(crate) struct Spreading<'a> {
    pub(crate) meter: &'a Meter,
    pub(crate) placement: &'a Placement,
}

/// Loads the model and does `work` with it, on every rank: its forward passes are collective. Returns what the first rank
/// returned; `None` in other processes of an MPI program. What is wrong without the weights is found before anything runs.
pub(crate) fn with_model<T: Send>(
    load: &LoadArgs,
    spread: &SpreadArgs,
    work: impl Fn(&Decoder) -> Result<T> + Sync,
) -> Result<Option<T>> {
    with_spread_model(load, spread, |decoder, _| work(decoder))
}

/// [`with_model`], with how its experts are spread, if there are several ranks.
pub(crate) fn with_spread_model<T: Send>(
    load: &LoadArgs,
    spread: &SpreadArgs,
    work: impl Fn(&Decoder, Option<&Spreading<'_>>) -> Result<T> + Sync,
) -> Result<Option<T>> {
    let tuned = LimitFile::read(&load.model)?;
    let world = spread.world.or_ranks(match (&spread.placement, &tuned) {
        (Some(path), _) => Some(PlacementFile::read(path)?.placement.topology().num_ranks()),
        (None, Some((_, file))) => Some(file.placement.topology().num_ranks()),
        (None, None) => None,
    });
    if !world.is_parallel() {
        refuse_mpirun()?;
        spread.alone()?;
        if let Some((LimitFile { max_ranks: Some(max), .. }, file)) = &tuned {
            let ranks = file.placement.topology().num_ranks();
            eprintln!(
                "occult: tuned with at most {max} of {ranks} ranks per token; on one rank there is no limit"
            );
        }
        return work(&model::load(load)?, None).map(Some);
    }
    let spec = occult_model::hf::read_spec(&load.model)?;
    let wanted = Wanted::new(load, spread, &spec, tuned)?;
    run_world(&world, |comm| {
        let metered = Metered::new(comm);
        let meter = metered.meter();
        let (decoder, placement) = wanted.load(load, Arc::new(metered))?;
        work(&decoder, Some(&Spreading { meter: &meter, placement: &placement }))
    })
}

impl SpreadArgs {
    /// Options that mean something only with several ranks.
    fn alone(&self) -> Result<()> {
        let given = [
            ("--placement", self.placement.is_some()),
            ("--place-by", self.place_by.is_some()),
            ("--mode conventional", self.mode != ModeArg::default()),
            ("--overlap", self.overlap.needs_ranks()),
            ("--max-ranks", self.max_ranks.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(needs_ranks(option)),
            None => Ok(()),
        }
    }
}

/// What was asked for, as far as it is known before the ranks are.
struct Wanted<'a> {
    args: &'a SpreadArgs,
    spec: &'a ModelSpec,
    file: Option<Placement>,
    profile: Option<Profile>,
    pruning: Option<Pruning>,
    /// By MoE layer; empty unless the rule needs them.
    similarity: Vec<Arc<SimilarityTable>>,
    /// Computed by the rank that comes first, for all of this process.
    computed: OnceLock<Result<Placement, String>>,
}

impl<'a> Wanted<'a> {
    fn new(
        load: &LoadArgs,
        args: &'a SpreadArgs,
        spec: &'a ModelSpec,
        tuned: Option<(LimitFile, PlacementFile)>,
    ) -> Result<Self> {
        let meta = model::profile_meta(spec, model::name(&load.model));
        let (limit, tuned) = tuned.unzip();
        let file = match &args.placement {
            Some(path) => Some(setup::placement(path, &meta)?),
            None if args.place_by.is_some() => None,
            None => tuned,
        };
        let profile = args.place_by.as_deref().map(|path| pruning::profile_of(path, spec)).transpose()?;
        let named = |name: &str| {
            PruneRule::named(name)
                .with_context(|| format!("{}: rule {name:?} is not known", load.model.display()))
        };
        let tuned = limit.as_ref().map(|l| named(&l.rule)).transpose()?;
        let rule = args.rule.or(tuned).unwrap_or(PruneRule::BestMass);
        let budget = match (args.max_ranks, &limit) {
            (Some(n), _) => Some(args.adaptive.budget(usize::from(n))),
            (None, limit) => limit.as_ref().and_then(LimitFile::budget),
        };
        let similarity = match (budget, rule) {
            (Some(_), PruneRule::Similarity) => match (&args.similar_by, limit.and_then(|l| l.similarity)) {
                (Some(path), _) => pruning::similarity_tables(path, spec)?,
                (None, Some(name)) => {
                    let (layers, experts) = (spec.num_moe_layers(), spec.moe.router.num_experts);
                    let tables = read_similarity(&load.model.join(name), layers, experts)?;
                    tables.into_iter().map(Arc::new).collect()
                }
                (None, None) => return Err(Usage(pruning::NO_TABLE.to_owned()).into()),
            },
            _ => Vec::new(),
        };
        let pruning = match (budget, rule.with(similarity.first())) {
            (Some(budget), Some(rule)) => Some(Pruning { rule, budget }),
            _ => None,
        };
        let file = file.map(|f| f.placement);
        Ok(Self { args, spec, file, profile, pruning, similarity, computed: OnceLock::new() })
    }

    /// The model with this rank's experts.
    fn load(&self, load: &LoadArgs, comm: Arc<dyn Communicator>) -> Result<(Decoder, Placement)> {
        let topology = topology_of(&*comm)?;
        let hosts = comm.host_of_rank();
        let here = hosts.iter().filter(|&&h| h == hosts[comm.rank()]).count();
        let threads = Threads::new((setup::threads(load.threads) / here).max(1));
        let options = LoadOptions { dtype: load.dtype.map(|d| d.stored()), threads: Some(threads) };
        let files = model::open(&load.model, options)?;
        let spread = Spread {
            similarity: self.similarity.clone(),
            ..Spread::new(self.placement(topology)?, self.options(topology)?)
        };
        if let Some(pruning) = &spread.options.pruning {
            let router = &self.spec.moe.router;
            for (i, layer) in spread.placement.layers().iter().enumerate() {
                check_limit(layer, pruning.budget.max_ranks(), router.top_k, router.groups)
                    .map_err(|e| anyhow!("--max-ranks: {}", e.in_layer(i)))?;
            }
        }
        let spinner = (comm.rank() == 0).then(|| {
            progress::spinner(&format!("loading {} on {} ranks", load.model.display(), hosts.len()))
        });
        let decoder = files.load_spread(&Ranks::new(Arc::clone(&comm)), &spread);
        spinner.inspect(|s| s.finish_and_clear());
        Ok((decoder?, spread.placement))
    }

    fn options(&self, topology: Topology) -> Result<LayerOptions> {
        let mode = match self.args.mode {
            ModeArg::Conventional => Mode::Conventional,
            ModeArg::Dedup => Mode::Dedup,
        };
        let overlap = self.args.overlap.over(topology)?;
        Ok(LayerOptions { mode, overlap, pruning: self.pruning.clone(), ..LayerOptions::new(topology) })
    }

    /// Of the file, of a search in the profile, or equal runs.
    fn placement(&self, topology: Topology) -> Result<Placement> {
        if let Some(placement) = &self.file {
            return Ok(placement.clone());
        }
        let compute = || match &self.profile {
            Some(profile) => search(profile, topology),
            None => {
                let layer = contiguous::place(self.spec.moe.router.num_experts, topology.num_ranks())?;
                Ok(Placement::new(topology, vec![layer; self.spec.num_moe_layers()])?)
            }
        };
        let computed = self.computed.get_or_init(|| compute().map_err(|e| crate::exit::message(&e)));
        computed.clone().map_err(|message| anyhow!(message))
    }
}

/// The search of `occult place` with its defaults: the same on every rank.
fn search(profile: &Profile, topology: Topology) -> Result<Placement> {
    let args = SearchArgs::default();
    let placer = Placer::new(&args, topology, None, profile.meta().num_experts)?;
    let holdout = Holdout::new(args.holdout, args.seed)?;
    let layers = parallel::map_ordered(profile.num_layers(), setup::threads(None), |layer| {
        let place = || {
            let rows = tokens::read(profile, layer, Columns::IDS, args.max_tokens, holdout)?;
            Ok::<_, anyhow::Error>(
                placer.place(Method::Search, layer, &LayerInput::Tokens(&rows.train))?.placement,
            )
        };
        place().with_context(|| format!("{}: layer {layer}", profile.path().display()))
    })?;
    Ok(Placement::new(topology, layers)?)
}
