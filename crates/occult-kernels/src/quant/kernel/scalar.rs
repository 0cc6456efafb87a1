//! The tile without vector instructions.

use super::super::activations::HEAD;
use super::super::matrix::{LEVELS, PANEL_ROWS};
use super::{Args, TILE_COLS, TileFn};

pub(super) const Q8: [TileFn; 4] = [tile::<1, false>, tile::<2, false>, tile::<3, false>, tile::<4, false>];
pub(super) const Q4: [TileFn; 4] = [tile::<1, true>, tile::<2, true>, tile::<3, true>, tile::<4, true>];

/// # Safety
/// The pointers of `args` are valid for `M` rows and its groups.
unsafe fn tile<const M: usize, const Q4: bool>(args: &Args) {
    let (group, quads_per_64) = (4 * args.quads, if Q4 { 2 } else { 1 });
    for g in 0..args.groups {
        for m in 0..M {
            for col in 0..TILE_COLS {
                let (p, r) = (col / PANEL_ROWS, col % PANEL_ROWS);
                // SAFETY: the caller's promise; a record is a scale, a start and the levels of a group.
                unsafe {
                    let record = (*args.rows.add(m)).add(args.skip + g * (HEAD + group));
                    let mut dot = record.add(4).cast::<i32>().read();
                    for quad in 0..args.quads {
                        let at = g * args.quads + quad;
                        let w = args.data[p].add((at / quads_per_64 * PANEL_ROWS + r) * 4);
                        for c in 0..4 {
                            let x = record.add(HEAD + 4 * quad + c).cast::<i8>().read();
                            let code = *w.add(c);
                            let level =
                                if Q4 { LEVELS[usize::from(code >> (at % 2 * 4) & 15)] } else { code };
                            dot += i32::from(x) * i32::from(level);
                        }
                    }
                    let scale =
                        record.cast::<f32>().read() * (*args.scales[p].add(g * PANEL_ROWS + r)).to_f32();
                    let sum = args.out.add(m * TILE_COLS + col);
                    *sum = (dot as f32).mul_add(scale, *sum);
                }
            }
        }
    }
}
