//! `occult.json` in a model directory: what the model was trained with and no checkpoint format holds. The limit on the ranks
//! a token visits, and the bias on the routers' choices.
//!
//! ```json
//! { "format": "occult.limit.v1", "placement": "placement.json", "max_ranks": 2, "rule": "best-mass", "keep_mass": null, "max_error": null, "similarity": null }
//! ```
//! Every field but `format` can be absent; `"selection_bias": [[..], ..]` has one number per expert for each MoE layer.
//! Other programs do not read it: for them the directory is the model without a limit and without the bias.

use std::path::{Path, PathBuf};

use occult_plan::Budget;
use serde::{Deserialize, Serialize};

use crate::error::{FormatError, Result};
use crate::placement_file::{PlacementFile, write_atomic};

/// The value of `format`.
pub const LIMIT_FORMAT: &str = "occult.limit.v1";
/// The file's name in a model directory.
pub const LIMIT_FILE: &str = "occult.json";

/// What a model was trained with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LimitFile {
    format: String,
    /// File name of the placement in the same directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<String>,
    /// Most ranks of a token; absent: no limit.
    #[serde(default)]
    pub max_ranks: Option<usize>,
    /// How ranks and replacements are chosen: `best-mass`, `least-error`, `router-score` or `similarity`.
    #[serde(default = "best_mass")]
    pub rule: String,
    /// Adaptive: the share of the routing mass that the fewest ranks must keep.
    #[serde(default)]
    pub keep_mass: Option<f64>,
    /// Adaptive: the most weight that the fewest ranks may lose ([`Budget::Bounded`]).
    #[serde(default)]
    pub max_error: Option<f64>,
    /// For the rule `similarity`: file name of the tables ([`read_similarity`](crate::read_similarity)) in the same directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub similarity: Option<String>,
    /// `[E]` for every MoE layer: added to the routers' probabilities for the choice of experts, not for their weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selection_bias: Option<Vec<Vec<f32>>>,
}

fn best_mass() -> String {
    "best-mass".to_owned()
}

impl LimitFile {
    /// A description for a placement that lies in the same directory under this name; without a budget there is no limit.
    pub fn new(placement: &str, rule: &str, budget: Option<Budget>) -> Self {
        let mut file = Self { placement: Some(placement.into()), rule: rule.into(), ..Self::empty() };
        file.max_ranks = budget.map(Budget::max_ranks);
        match budget {
            None | Some(Budget::Fixed { .. }) => {}
            Some(Budget::Adaptive { share, .. }) => file.keep_mass = Some(share),
            Some(Budget::Bounded { error, .. }) => file.max_error = Some(error),
        }
        file
    }

    /// A description of a bias on the routers' choices alone.
    pub fn of_bias(selection_bias: Vec<Vec<f32>>) -> Self {
        Self { selection_bias: Some(selection_bias), ..Self::empty() }
    }

    fn empty() -> Self {
        Self {
            format: LIMIT_FORMAT.into(),
            placement: None,
            max_ranks: None,
            rule: best_mass(),
            keep_mass: None,
            max_error: None,
            similarity: None,
            selection_bias: None,
        }
    }

    /// How many ranks a token may visit; `None` without a limit.
    pub fn budget(&self) -> Option<Budget> {
        let max_ranks = self.max_ranks?;
        Some(match (self.keep_mass, self.max_error) {
            (Some(share), _) => Budget::Adaptive { max_ranks, share },
            (None, Some(error)) => Budget::Bounded { max_ranks, error },
            (None, None) => Budget::Fixed { max_ranks },
        })
    }

    /// Reads the bias on the routers' choices of a model directory; `None` where it has none.
    pub fn read_bias(model: &Path) -> Result<Option<Vec<Vec<f32>>>> {
        Ok(Self::read_alone(model)?.and_then(|file| file.selection_bias))
    }

    fn read_alone(model: &Path) -> Result<Option<Self>> {
        let path = model.join(LIMIT_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(|e| FormatError::io("read", &path, e))?;
        let file: Self =
            serde_json::from_slice(&bytes).map_err(|e| FormatError::bad(&path, "", e.to_string()))?;
        if file.format != LIMIT_FORMAT {
            let message = format!("format is {:?}, expected {LIMIT_FORMAT:?}", file.format);
            return Err(FormatError::bad(&path, "", message));
        }
        Ok(Some(file))
    }

    /// Reads what a model directory says of a placement and a limit; `None` where it says nothing.
    pub fn read(model: &Path) -> Result<Option<(Self, PlacementFile)>> {
        let path = model.join(LIMIT_FILE);
        let Some(file) = Self::read_alone(model)? else { return Ok(None) };
        let named = [("placement", &file.placement), ("similarity", &file.similarity)];
        for (what, name) in named.into_iter().filter_map(|(what, name)| Some((what, name.as_ref()?))) {
            let name = PathBuf::from(name);
            if name.components().count() != 1 || name.file_name().is_none() {
                return Err(FormatError::bad(&path, "", format!("{what} is {name:?}, expected a file name")));
            }
        }
        let Some(name) = &file.placement else {
            if file.max_ranks.is_some() {
                return Err(FormatError::bad(&path, "", "max_ranks without a placement"));
            }
            return Ok(None);
        };
        let placement = PlacementFile::read(&model.join(name))?;
        let ranks = placement.placement.topology().num_ranks();
        if let Some(max) = file.max_ranks.filter(|&n| n == 0 || n > ranks) {
            let message = format!("max_ranks is {max}, the placement has {ranks} ranks");
            return Err(FormatError::bad(&path, "", message));
        }
        Ok(Some((file, placement)))
    }

    /// Writes it into a model directory.
    pub fn write(&self, model: &Path) -> Result<()> {
        let path = model.join(LIMIT_FILE);
        let text = serde_json::to_vec_pretty(self).map_err(|e| FormatError::bad(&path, "", e.to_string()))?;
        write_atomic(&path, &text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement_file::PlacementMeta;
    use occult_plan::{LayerPlacement, Placement, Topology};

    #[test]
    fn it_comes_back_and_nonsense_is_refused() {
        let dir = tempfile::tempdir().expect("directory");
        assert_eq!(LimitFile::read(dir.path()).expect("nothing"), None);
        let layer = LayerPlacement::from_expert_ranks(2, &[0, 1, 0, 1]).expect("layer");
        let placement = Placement::new(Topology::flat(2).expect("topology"), vec![layer]).expect("placement");
        let meta = PlacementMeta { layer_ids: vec![0], method: "test".into(), ..PlacementMeta::default() };
        let placement = PlacementFile::new(meta, placement).expect("file");
        placement.write(&dir.path().join("placement.json")).expect("written");
        let file =
            LimitFile::new("placement.json", "best-mass", Some(Budget::Bounded { max_ranks: 1, error: 0.1 }));
        file.write(dir.path()).expect("written");
        assert_eq!(LimitFile::read(dir.path()).expect("read"), Some((file.clone(), placement)));
        for budget in [
            None,
            Some(Budget::Fixed { max_ranks: 2 }),
            Some(Budget::Adaptive { max_ranks: 2, share: 0.7 }),
            Some(Budget::Bounded { max_ranks: 2, error: 0.2 }),
        ] {
            assert_eq!(LimitFile::new("placement.json", "best-mass", budget).budget(), budget);
        }
        for (bad, message) in [
            (LimitFile { max_ranks: Some(3), ..file.clone() }, "max_ranks is 3"),
            (
                LimitFile { placement: Some("../placement.json".into()), ..file.clone() },
                "expected a file name",
            ),
            (LimitFile { similarity: Some("/etc/x".into()), ..file.clone() }, "similarity is"),
            (LimitFile { placement: None, ..file.clone() }, "max_ranks without a placement"),
            (LimitFile { format: "other".into(), ..file.clone() }, "format is"),
        ] {
            bad.write(dir.path()).expect("written");
            let error = LimitFile::read(dir.path()).expect_err("refused").to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn a_bias_comes_back_to_the_bit_with_and_without_a_placement() {
        let dir = tempfile::tempdir().expect("directory");
        assert_eq!(LimitFile::read_bias(dir.path()).expect("nothing"), None);
        let bias = vec![vec![0.1f32, -0.3, f32::MIN_POSITIVE], vec![1e-3 + 2e-3, 1.0 / 3.0, -0.0]];
        LimitFile::of_bias(bias.clone()).write(dir.path()).expect("written");
        assert_eq!(LimitFile::read(dir.path()).expect("no limit"), None);
        let found = LimitFile::read_bias(dir.path()).expect("read").expect("a bias");
        let bits = |b: &[Vec<f32>]| b.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&bias));
        // As files were before there was a bias.
        let old = r#"{"format":"occult.limit.v1","placement":"p.json","max_ranks":2,"rule":"router-score"}"#;
        std::fs::write(dir.path().join(LIMIT_FILE), old).expect("written");
        assert_eq!(LimitFile::read_bias(dir.path()).expect("read"), None);
        assert!(LimitFile::read(dir.path()).expect_err("no placement").to_string().contains("p.json"));
    }
}
