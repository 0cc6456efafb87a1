//! Routing to measure: experts that like each other, spread over the ids so that blocks of ids are a bad placement.

use super::files::{Array, npz, safetensors};

/// Token-level routing of several layers: ids and weights `[tokens, layers, k]`, logits `[tokens, layers, experts]`.
#[derive(Clone)]
pub(crate) struct Rows {
    pub(crate) tokens: usize,
    pub(crate) layers: usize,
    pub(crate) experts: usize,
    pub(crate) k: usize,
    pub(crate) ids: Vec<u16>,
    pub(crate) weights: Option<Vec<f32>>,
    pub(crate) logits: Option<Vec<f32>>,
    pub(crate) metadata: Vec<(&'static str, String)>,
}

/// xorshift64*: the same rows on every machine.
struct Random(u64);

impl Random {
    /// 0 to below 1.
    fn unit(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1 << 24) as f32
    }
}

impl Rows {
    /// Router logits are noise, higher for the experts of the token's topic; the `k` highest are chosen, in descending
    /// order, with their softmax over all experts as weights.
    pub(crate) fn new(seed: u64, tokens: usize, layers: usize, experts: usize, k: usize) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9).wrapping_add(0x1234_5678_9ABC));
        let topics = (experts / k).max(2);
        let (mut ids, mut weights, mut all_logits) = (vec![], vec![], vec![]);
        for _ in 0..tokens {
            let topic = (random.unit() * topics as f32) as usize;
            for layer in 0..layers {
                let logits: Vec<f32> = (0..experts)
                    .map(|e| {
                        let liked = (e + layer) % topics == topic;
                        3.0 * random.unit() + if liked { 1.5 } else { 0.0 }
                    })
                    .collect();
                let mut order: Vec<usize> = (0..experts).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
                let sum: f32 = logits.iter().map(|l| l.exp()).sum();
                ids.extend(order[..k].iter().map(|&e| e as u16));
                weights.extend(order[..k].iter().map(|&e| logits[e].exp() / sum));
                all_logits.extend(logits);
            }
        }
        Self {
            tokens,
            layers,
            experts,
            k,
            ids,
            weights: Some(weights),
            logits: Some(all_logits),
            metadata: vec![("num_experts", experts.to_string())],
        }
    }

    pub(crate) fn ids_only(self) -> Self {
        Self { weights: None, logits: None, ..self }
    }

    pub(crate) fn weights_only(self) -> Self {
        Self { logits: None, ..self }
    }

    pub(crate) fn with(mut self, key: &'static str, value: &str) -> Self {
        self.metadata.push((key, value.to_owned()));
        self
    }

    /// The expert sets of a layer, row by row.
    pub(crate) fn sets(&self, layer: usize) -> Vec<Vec<usize>> {
        let of_layer = self.ids.chunks(self.k).skip(layer).step_by(self.layers);
        of_layer.map(|row| row.iter().map(|&e| usize::from(e)).collect()).collect()
    }

    /// The router logits of a layer, row by row.
    pub(crate) fn layer_logits(&self, layer: usize) -> Vec<&[f32]> {
        let all = self.logits.as_ref().unwrap();
        all.chunks(self.experts).skip(layer).step_by(self.layers).collect()
    }

    pub(crate) fn arrays(&self) -> Vec<Array> {
        let (t, l) = (self.tokens, self.layers);
        let ids = self.ids.iter().map(|&e| i32::from(e));
        let mut arrays = vec![Array::i32("expert_ids", &[t, l, self.k], ids)];
        if let Some(weights) = &self.weights {
            arrays.push(Array::f32("weights", &[t, l, self.k], weights.iter().copied()));
        }
        if let Some(logits) = &self.logits {
            arrays.push(Array::f32("router_logits", &[t, l, self.experts], logits.iter().copied()));
        }
        arrays
    }

    pub(crate) fn safetensors(&self) -> Vec<u8> {
        let metadata: Vec<(&str, &str)> = self.metadata.iter().map(|(k, v)| (*k, v.as_str())).collect();
        safetensors(&self.arrays(), &metadata)
    }

    pub(crate) fn npz(&self) -> Vec<u8> {
        let mut arrays = self.arrays();
        arrays.push(Array::i32("num_experts", &[], [self.experts as i32]));
        npz(&arrays)
    }
}
