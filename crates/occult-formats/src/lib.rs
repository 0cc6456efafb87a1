//! Files of Occult and of other engines: routing profiles, placements, importers and exporters.
#![forbid(unsafe_code)]

pub mod pickle;
