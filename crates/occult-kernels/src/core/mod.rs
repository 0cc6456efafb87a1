//! The one packed matrix product under everything in this crate.
//!
//! `C (+)= A B`: A is read row by row and broadcast, B is read in panels of a few vectors. Both are packed first, which
//! is where rows are taken through an index and weights are widened. See `product` for the loops, `tile` for the
//! innermost one, `dot` for products with few rows, `isa` for the choice of instruction set.

pub(crate) mod activation;
mod ahead;
pub(crate) mod divide;
mod dot;
pub(crate) mod isa;
mod pack;
pub(crate) mod product;
pub(crate) mod scratch;
mod tile;

/// Steps of k that are packed at a time. The order of additions depends on it. Miri: small products have several blocks.
pub(crate) const K_BLOCK: usize = if cfg!(miri) { 16 } else { 512 };
/// Distance of two rows of a packed A panel: not a multiple of a cache way, so that rows do not evict each other.
pub(crate) const A_STRIDE: usize = K_BLOCK + 16;
/// Most rows of a tile, for any instruction set.
pub(crate) const MAX_TILE_ROWS: usize = 16;
/// Most columns of a tile, for any instruction set.
pub(crate) const MAX_TILE_COLS: usize = 64;
