//! Quantised weights: 8 or 4 bits per value, a scale per group of columns, products in integers. Inference only.
//!
//! A matrix `W` `[N, K]` (rows = outputs) is cut into *panels* of 16 rows and *groups* of `group` columns. `N` is padded to
//! whole panels and `K` to whole groups (`K'`) with weights that are exactly zero. With `G = K' / group`:
//!
//! | tensor | dtype | shape | what byte or value it is |
//! |---|---|---|---|
//! | data, [`Format::Q8`] | U8 | `[N/16, K'/4, 16, 4]` | `[p, j, r, i]`: the level of `W[16p + r, 4j + i]`, plus 128 |
//! | data, [`Format::Q4`] | U8 | `[N/16, K'/8, 16, 4]` | `[p, j, r, i]`: low half the code of `W[16p + r, 8j + i]`, high half that of column `8j + 4 + i`; its level is [`LEVELS`]`[code] - 128` |
//! | scales | BF16 | `[N/16, G, 16]` | `[p, g, r]`: `W[16p + r, k] = level * scale` for the columns `k` of group `g` |
//!
//! 64 consecutive bytes are thus one register of the kernels: 16 outputs by 4 columns, which `vpdpbusd` multiplies by the same
//! four activations. With groups of 32, [`Format::Q8`] takes 8.5 bits per weight and [`Format::Q4`] 4.5.
//!
//! Activations are quantised when they arrive, 8 bits with one f32 scale per row and group ([`mod@reference`] has the
//! definition). Their product with the levels is exact in 32-bit integers; groups are added in ascending order with one
//! fused multiply-add each. Every instruction set, block size and number of threads therefore gives the same bits.

mod activations;
mod encode;
mod error;
mod ffn;
mod isa;
mod kernel;
mod linear;
mod matrix;
mod product;
pub mod reference;
mod silu;

pub use encode::{ErrorStats, quantise};
pub use error::{QuantError, Result};
pub use ffn::{QuantisedExpert, expert_ffn, expert_ffn_with};
pub use isa::Isa;
pub use linear::{linear, linear_with};
pub use matrix::{Format, LEVELS, Layout, PANEL_ROWS, Quantised, QuantisedBuf};
