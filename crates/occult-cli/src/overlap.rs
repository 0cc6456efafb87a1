//! `--overlap`: the parts of a batch, for every command that runs a model over ranks.

use anyhow::Result;
use clap::Args;
use occult_moe::Overlap;
use occult_plan::Topology;

use crate::args::ClusterArgs;
use crate::setup;

/// How a batch is cut so that exchange runs beside compute.
#[derive(Debug, Args)]
pub(crate) struct OverlapArgs {
    /// Parts of a batch whose exchange runs beside the compute of another: off, a number, or auto (what is fastest on
    /// --cluster, off without one)
    #[arg(long, default_value = "auto", value_parser = parts, value_name = "PARTS")]
    overlap: Parts,
    #[command(flatten)]
    cluster: ClusterArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parts {
    Off,
    Auto,
    Number(usize),
}

fn parts(text: &str) -> Result<Parts, String> {
    match (text, text.parse::<usize>()) {
        ("off", _) => Ok(Parts::Off),
        ("auto", _) => Ok(Parts::Auto),
        (_, Ok(number)) if (1..=1024).contains(&number) => Ok(Parts::Number(number)),
        _ => Err("expected off, auto, or 1 to 1024 parts".to_owned()),
    }
}

impl OverlapArgs {
    /// Whether a number of parts was asked for, which means something only with several ranks.
    pub(crate) fn needs_ranks(&self) -> bool {
        matches!(self.overlap, Parts::Number(_))
    }

    /// What a layer over these ranks and nodes is told.
    ///
    /// # Errors
    /// That there is no such cluster, or that it cannot have these ranks and nodes.
    pub(crate) fn over(&self, topology: Topology) -> Result<Overlap> {
        Ok(match self.overlap {
            Parts::Off => Overlap::Off,
            Parts::Number(n) => Overlap::Chunks(n),
            Parts::Auto => match setup::cluster(&self.cluster, topology)? {
                Some(cluster) => Overlap::Auto(Box::new(cluster)),
                None => Overlap::Off,
            },
        })
    }
}
