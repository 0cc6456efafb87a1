//! Cluster files: links and compute for the cost model, as TOML.
//!
//! ```toml
//! name = "4 hosts of 2 GPUs"       # optional, the file's name otherwise
//! nodes = 4
//! ranks_per_node = 2
//!
//! [intra]                          # links within a node, one per rank
//! bandwidth_gb_per_s = 20.0        # 10^9 bytes per second, each way
//! latency_us = 5.0
//!
//! [inter]                          # links between nodes; needed when nodes > 1
//! bandwidth_gb_per_s = 12.5
//! latency_us = 15.0
//! per = "node"                     # one link for the node, or one for each "rank"
//!
//! [compute]                        # of each rank
//! tflops = 90.0                    # 10^12 operations per second reached by the expert products
//! memory_bandwidth_gb_per_s = 768.0
//! ```
//!
//! All keys are required unless said otherwise and no others are allowed. Numbers are positive; a latency may be 0.

use crate::{
    error::{FormatError, Result},
    io::read_whole,
};
use occult_plan::cost::{Cluster, Compute, InterLink, Link, LinkEnd};
use serde::Deserialize;
use std::path::Path;

/// Clusters that come with the program: name and file.
const PRESETS: [(&str, &str); 3] = [
    ("8xa6000-pcie", include_str!("../presets/8xa6000-pcie.toml")),
    ("8xh100-nvlink", include_str!("../presets/8xh100-nvlink.toml")),
    ("16x8xh100-400g", include_str!("../presets/16x8xh100-400g.toml")),
];

/// Names of the presets.
pub fn preset_names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// A preset by name. The error lists the names.
pub fn preset(name: &str) -> Result<Cluster> {
    match PRESETS.iter().find(|(preset, _)| *preset == name) {
        Some((name, text)) => from_toml(name, text),
        None => {
            let names: Vec<&str> = preset_names().collect();
            let message =
                format!("there is no cluster preset {name:?}, expected one of {}", names.join(", "));
            Err(FormatError::Request(message))
        }
    }
}

/// A preset by name, or else a cluster file by path: anything that ends in `.toml` or has a path separator is a path.
pub fn preset_or_file(name_or_path: &str) -> Result<Cluster> {
    if is_path(name_or_path) { read(name_or_path) } else { preset(name_or_path) }
}

/// Whether [`preset_or_file`] takes this for a path.
pub fn is_path(name_or_path: &str) -> bool {
    name_or_path.ends_with(".toml") || name_or_path.contains(std::path::is_separator)
}

/// A cluster file.
pub fn read(path: impl AsRef<Path>) -> Result<Cluster> {
    let path = path.as_ref();
    let bytes = read_whole(path)?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|e| FormatError::bad(path, "", format!("is not UTF-8 text: {e}")))?;
    from_toml(path, text)
}

/// The text of a cluster file; `file` is for messages and for the name of a cluster that has none. Errors name the line of
/// what does not belong there, and the key of a number that cannot be.
pub fn from_toml(file: impl AsRef<Path>, text: &str) -> Result<Cluster> {
    let file = file.as_ref();
    let raw: RawCluster = toml::from_str(text).map_err(|e| {
        let line = |start: usize| text.as_bytes().iter().take(start).filter(|&&b| b == b'\n').count() + 1;
        let place = e.span().map_or(String::new(), |span| format!("line {}", line(span.start)));
        FormatError::bad(file, place, e.message().to_string())
    })?;
    for (key, number, zero) in raw.numbers() {
        let possible = number.is_finite() && (number > 0.0 || (zero && number == 0.0));
        if !possible {
            let expected = if zero { "a number that is not negative" } else { "a positive number" };
            return Err(FormatError::bad(file, key, format!("expected {expected}, found {number}")));
        }
    }
    if raw.nodes > 1 && raw.inter.is_none() {
        let message = format!("is missing: {} nodes need links between them", raw.nodes);
        return Err(FormatError::bad(file, "[inter]", message));
    }
    let name = raw.name.unwrap_or_else(|| crate::io::file_name(file));
    let cluster = Cluster {
        name,
        nodes: raw.nodes,
        ranks_per_node: raw.ranks_per_node,
        intra: link(raw.intra.bandwidth_gb_per_s, raw.intra.latency_us),
        inter: raw.inter.map(|inter| InterLink {
            link: link(inter.bandwidth_gb_per_s, inter.latency_us),
            per: match inter.per {
                RawEnd::Rank => LinkEnd::Rank,
                RawEnd::Node => LinkEnd::Node,
            },
        }),
        compute: Compute {
            flops_per_s: raw.compute.tflops * 1e12,
            memory_bandwidth_bytes_per_s: raw.compute.memory_bandwidth_gb_per_s * 1e9,
        },
    };
    // Counts of ranks, and numbers that only overflow with their unit.
    cluster.check().map_err(|e| FormatError::bad(file, "", e.to_string()))?;
    Ok(cluster)
}

fn link(gb_per_s: f64, latency_us: f64) -> Link {
    Link { bandwidth_bytes_per_s: gb_per_s * 1e9, latency_s: latency_us * 1e-6 }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCluster {
    name: Option<String>,
    nodes: usize,
    ranks_per_node: usize,
    intra: RawIntra,
    inter: Option<RawInter>,
    compute: RawCompute,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIntra {
    bandwidth_gb_per_s: f64,
    latency_us: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawInter {
    bandwidth_gb_per_s: f64,
    latency_us: f64,
    per: RawEnd,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawEnd {
    Rank,
    Node,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCompute {
    tflops: f64,
    memory_bandwidth_gb_per_s: f64,
}

impl RawCluster {
    /// Key, value, and whether it may be 0.
    fn numbers(&self) -> Vec<(&'static str, f64, bool)> {
        let mut numbers = vec![
            ("nodes", self.nodes as f64, false),
            ("ranks_per_node", self.ranks_per_node as f64, false),
            ("intra.bandwidth_gb_per_s", self.intra.bandwidth_gb_per_s, false),
            ("intra.latency_us", self.intra.latency_us, true),
            ("compute.tflops", self.compute.tflops, false),
            ("compute.memory_bandwidth_gb_per_s", self.compute.memory_bandwidth_gb_per_s, false),
        ];
        if let Some(inter) = &self.inter {
            numbers.push(("inter.bandwidth_gb_per_s", inter.bandwidth_gb_per_s, false));
            numbers.push(("inter.latency_us", inter.latency_us, true));
        }
        numbers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
nodes = 4
ranks_per_node = 2
[intra]
bandwidth_gb_per_s = 20
latency_us = 5.5
[inter]
bandwidth_gb_per_s = 12.5
latency_us = 0
per = \"node\"
[compute]
tflops = 90
memory_bandwidth_gb_per_s = 768
";

    fn error(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from));
        from_toml("c.toml", &GOOD.replacen(from, to, 1)).unwrap_err().to_string()
    }

    #[test]
    fn units_are_converted() {
        let cluster = from_toml("dir/c.toml", GOOD).unwrap();
        assert_eq!((cluster.name.as_str(), cluster.nodes, cluster.ranks_per_node), ("c.toml", 4, 2));
        assert_eq!(cluster.intra.bandwidth_bytes_per_s, 20e9);
        assert!((cluster.intra.latency_s - 5.5e-6).abs() < 1e-18);
        let inter = cluster.inter.unwrap();
        assert_eq!(
            (inter.per, inter.link.bandwidth_bytes_per_s, inter.link.latency_s),
            (LinkEnd::Node, 12.5e9, 0.0)
        );
        assert_eq!(cluster.compute.flops_per_s, 90e12);
        assert_eq!(cluster.compute.memory_bandwidth_bytes_per_s, 768e9);
    }

    #[test]
    fn presets_are_good_and_found_by_name() {
        let worlds: Vec<(usize, usize)> = preset_names()
            .map(|name| {
                let cluster = preset(name).unwrap();
                assert_ne!(cluster.name, name, "a preset has a name for people");
                (cluster.nodes, cluster.ranks_per_node)
            })
            .collect();
        assert_eq!(worlds, [(1, 8), (1, 8), (16, 8)]);
        let a6000 = preset_or_file("8xa6000-pcie").unwrap();
        assert_eq!((a6000.compute.flops_per_s, a6000.intra.bandwidth_bytes_per_s), (90e12, 16e9));
        assert_eq!(
            preset_or_file("8xa100").unwrap_err().to_string(),
            "there is no cluster preset \"8xa100\", expected one of 8xa6000-pcie, 8xh100-nvlink, 16x8xh100-400g"
        );
    }

    #[test]
    fn files_are_read_by_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lab.toml");
        std::fs::write(&path, GOOD).unwrap();
        assert_eq!(preset_or_file(path.to_str().unwrap()).unwrap().name, "lab.toml");
        std::fs::write(&path, b"name = \"\xff\"").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("lab.toml: is not UTF-8"));
        assert!(
            preset_or_file("absent.toml").unwrap_err().to_string().starts_with("cannot open absent.toml")
        );
    }

    #[test]
    fn unknown_and_missing_keys_are_named_with_their_line() {
        let message = error("latency_us = 5.5", "latency_ms = 5.5");
        assert!(message.starts_with("c.toml: line 5: unknown field `latency_ms`"), "{message}");
        let message = error("tflops = 90\n", "");
        assert!(message.contains("missing field `tflops`"), "{message}");
        let message = error("\"node\"", "\"host\"");
        assert!(message.starts_with("c.toml: line 9: unknown variant `host`"), "{message}");
        let message = error("nodes = 4", "nodes = = 4");
        assert!(message.starts_with("c.toml: line 1: "), "{message}");
        let message = error("[intra]", "[lan]");
        assert!(message.contains("unknown field `lan`"), "{message}");
    }

    #[test]
    fn numbers_that_cannot_be_are_named() {
        let positive = "expected a positive number, found";
        for (from, to, expected) in [
            ("tflops = 90", "tflops = 0", format!("compute.tflops: {positive} 0")),
            ("= 12.5", "= -12.5", format!("inter.bandwidth_gb_per_s: {positive} -12.5")),
            ("= 768", "= nan", format!("compute.memory_bandwidth_gb_per_s: {positive} NaN")),
            ("= 20", "= inf", format!("intra.bandwidth_gb_per_s: {positive} inf")),
            ("= 5.5", "= -1", "intra.latency_us: expected a number that is not negative, found -1".into()),
            ("ranks_per_node = 2", "ranks_per_node = 0", format!("ranks_per_node: {positive} 0")),
        ] {
            assert_eq!(error(from, to), format!("c.toml: {expected}"));
        }
        assert!(error("nodes = 4", "nodes = -4").contains("line 1"));
        assert!(error("nodes = 4", "nodes = 100000").contains("number of ranks"));
        assert!(error("= 768", "= 1e308").contains("memory bandwidth"));
        let without =
            GOOD.split("[inter]").next().unwrap().to_string() + GOOD.split("\"node\"\n").nth(1).unwrap();
        assert_eq!(
            from_toml("c.toml", &without).unwrap_err().to_string(),
            "c.toml: [inter]: is missing: 4 nodes need links between them"
        );
        assert!(from_toml("c.toml", &without.replace("nodes = 4", "nodes = 1")).is_ok());
    }
}
