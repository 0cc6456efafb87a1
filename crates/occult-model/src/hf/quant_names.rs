//! Names of the three tensors that stand for a quantised matrix `NAME` of shape `[N, K]`:
//!
//! | name | dtype | shape |
//! |---|---|---|
//! | `NAME.q8` or `NAME.q4` | U8 | `[N/16, K'/4 or K'/8, 16, 4]` |
//! | `NAME.scales` | BF16 | `[N/16, G, 16]` |
//! | `NAME.shape` | I64 | `[3]`: N, K and the columns of a group |
//!
//! [`occult_kernels::quant`] says what the bytes mean.

use occult_kernels::quant::Format;

pub(crate) const SCALES: &str = ".scales";
pub(crate) const SHAPE: &str = ".shape";

/// Suffix of the levels.
pub(crate) fn data(format: Format) -> &'static str {
    match format {
        Format::Q8 => ".q8",
        Format::Q4 => ".q4",
    }
}

/// The format in which a checkpoint has `name`, if it is quantised.
pub(crate) fn format_of(name: &str, contains: impl Fn(&str) -> bool) -> Option<Format> {
    [Format::Q8, Format::Q4].into_iter().find(|&f| contains(&format!("{name}{}", data(f))))
}

/// The matrix that a tensor of this name is a part of.
pub(crate) fn base(name: &str) -> Option<&str> {
    [".q8", ".q4", SCALES, SHAPE].into_iter().find_map(|suffix| name.strip_suffix(suffix))
}
