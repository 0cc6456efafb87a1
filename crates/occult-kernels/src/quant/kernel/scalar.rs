//! The tile without vector instructions.

use super::super::matrix::{Format, LEVELS, Layout, PANEL_ROWS};
use super::{Block, Panel, Tile};

pub(super) fn tile(layout: &Layout, block: Block<'_>, panels: &[Panel<'_>], out: &mut Tile) {
    let quads = layout.group() / 4;
    for (p, (data, scales)) in panels.iter().enumerate() {
        for g in 0..layout.groups() {
            for i in 0..block.rows {
                let at = g * block.rows + i;
                for r in 0..PANEL_ROWS {
                    let mut dot = block.starts[at];
                    for quad in g * quads..(g + 1) * quads {
                        let x = &block.levels[(quad * block.rows + i) * 4..][..4];
                        dot += match layout.format() {
                            Format::Q8 => {
                                let w = &data[(quad * PANEL_ROWS + r) * 4..][..4];
                                quad_dot(x, |c| w[c])
                            }
                            Format::Q4 => {
                                let w = &data[(quad / 2 * PANEL_ROWS + r) * 4..][..4];
                                let shift = quad % 2 * 4;
                                quad_dot(x, |c| LEVELS[usize::from(w[c] >> shift & 15)])
                            }
                        };
                    }
                    let scale = block.scales[at] * scales[g * PANEL_ROWS + r].to_f32();
                    let sum = &mut out.0[i][p * PANEL_ROWS + r];
                    *sum = (dot as f32).mul_add(scale, *sum);
                }
            }
        }
    }
}

fn quad_dot(x: &[i8], w: impl Fn(usize) -> u8) -> i32 {
    x.iter().enumerate().map(|(c, &x)| i32::from(x) * i32::from(w(c))).sum()
}
