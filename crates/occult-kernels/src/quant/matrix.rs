//! The stored matrix: shape, borrowed view, owned buffer.

use half::bf16;

use super::error::{QuantError, Result, check_len};

/// Rows of a panel: the outputs of one 512-bit register.
pub const PANEL_ROWS: usize = 16;

/// What is added to a level so that it is an unsigned byte.
pub(super) const ZERO_POINT: i32 = 128;

/// The 16 levels of [`Format::Q4`], plus 128: the best for values of a normal distribution in groups of 32 with a fitted scale
/// (Lloyd's algorithm over 3,000 such groups, half of them heavy-tailed; rounded to bytes). Level 0 is among them.
pub const LEVELS: [u8; 16] = [1, 32, 52, 67, 81, 94, 106, 117, 128, 138, 150, 162, 175, 190, 207, 230];

/// Bits of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 8 bits: levels -127..=127, evenly spaced.
    Q8,
    /// 4 bits: one of the 16 levels of [`LEVELS`].
    Q4,
}

impl Format {
    /// `q8` or `q4`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Q8 => "q8",
            Format::Q4 => "q4",
        }
    }

    /// Bytes of the weights of one panel of `cols` columns.
    fn panel_bytes(self, cols: usize) -> usize {
        match self {
            Format::Q8 => cols * PANEL_ROWS,
            Format::Q4 => cols * PANEL_ROWS / 2,
        }
    }
}

/// Format and shape of a quantised matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    format: Format,
    group: usize,
    rows: usize,
    cols: usize,
}

impl Layout {
    /// Groups of columns that share a scale, where nothing else is asked for: as exact as the formats of the same name
    /// elsewhere; groups of 64 are 9 % faster at many rows and
    /// have an error 12 % larger (normal distribution).
    pub const DEFAULT_GROUP: usize = 32;

    /// `rows` outputs, `cols` inputs, scales for every `group` columns (32, 64 or 128).
    pub fn new(format: Format, group: usize, rows: usize, cols: usize) -> Result<Self> {
        if !matches!(group, 32 | 64 | 128) {
            return Err(QuantError::Group(group));
        }
        // Nothing that could not be allocated anyway: keeps the products below from wrapping.
        if rows.checked_add(PANEL_ROWS).and_then(|r| r.checked_mul(cols.checked_add(group)?)).is_none() {
            return Err(QuantError::Shape(format!("a matrix of {rows} x {cols}")));
        }
        Ok(Self { format, group, rows, cols })
    }

    /// Bits of a weight.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Columns that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Outputs `N`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs `K`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Panels of 16 rows.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }

    /// Groups of columns `G`.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Columns with padding, `K'`.
    pub fn padded_cols(&self) -> usize {
        self.groups() * self.group
    }

    /// Shape of the data as a tensor of bytes.
    pub fn data_shape(&self) -> [usize; 4] {
        let per_byte = if self.format == Format::Q8 { 4 } else { 8 };
        [self.panels(), self.padded_cols() / per_byte, PANEL_ROWS, 4]
    }

    /// Shape of the scales.
    pub fn scales_shape(&self) -> [usize; 3] {
        [self.panels(), self.groups(), PANEL_ROWS]
    }

    pub(super) fn panel_bytes(&self) -> usize {
        self.format.panel_bytes(self.padded_cols())
    }

    pub(super) fn panel_scales(&self) -> usize {
        self.groups() * PANEL_ROWS
    }

    /// Byte of the data that holds the weight at `(row, col)`, and how far its code is shifted.
    pub(super) fn place(&self, row: usize, col: usize) -> (usize, u32) {
        let (panel, r) = (row / PANEL_ROWS * self.panel_bytes(), row % PANEL_ROWS);
        match self.format {
            Format::Q8 => (panel + (col / 4 * PANEL_ROWS + r) * 4 + col % 4, 0),
            Format::Q4 => (panel + (col / 8 * PANEL_ROWS + r) * 4 + col % 4, (col as u32 / 4 % 2) * 4),
        }
    }

    pub(super) fn scale_place(&self, row: usize, group: usize) -> usize {
        row / PANEL_ROWS * self.panel_scales() + group * PANEL_ROWS + row % PANEL_ROWS
    }
}

/// A quantised matrix `[N, K]` somewhere in memory, see the [module](super).
#[derive(Debug, Clone, Copy)]
pub struct Quantised<'a> {
    layout: Layout,
    data: &'a [u8],
    scales: &'a [bf16],
}

impl<'a> Quantised<'a> {
    /// From its tensors, which must have exactly the lengths of the layout.
    pub fn new(layout: Layout, data: &'a [u8], scales: &'a [bf16]) -> Result<Self> {
        check_len("quantised weights", data.len(), layout.panels() * layout.panel_bytes())?;
        check_len("scales", scales.len(), layout.panels() * layout.panel_scales())?;
        Ok(Self { layout, data, scales })
    }

    /// Errors when a scale is NaN or infinite; every byte of the data is a weight.
    pub fn check_finite(&self) -> Result<()> {
        match self.scales.iter().position(|s| !s.is_finite()) {
            None => Ok(()),
            Some(at) => Err(QuantError::BadScale { at, value: self.scales[at].to_f32() }),
        }
    }

    /// Errors unless this is `[rows, cols]`.
    pub(crate) fn expect_shape(&self, what: &str, rows: usize, cols: usize) -> Result<()> {
        let (n, k) = (self.layout.rows, self.layout.cols);
        if (n, k) == (rows, cols) {
            return Ok(());
        }
        Err(QuantError::Shape(format!("{what} is [{n}, {k}], expected [{rows}, {cols}]")))
    }

    /// Format and shape.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The data tensor.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// The scales.
    pub fn scales(&self) -> &'a [bf16] {
        self.scales
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.data.len() + 2 * self.scales.len()
    }

    /// Data and scales of one panel.
    pub(super) fn panel(&self, p: usize) -> (&'a [u8], &'a [bf16]) {
        let (bytes, scales) = (self.layout.panel_bytes(), self.layout.panel_scales());
        (&self.data[p * bytes..][..bytes], &self.scales[p * scales..][..scales])
    }
}

/// An owned quantised matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantisedBuf {
    pub(super) layout: Layout,
    pub(super) data: Vec<u8>,
    pub(super) scales: Vec<bf16>,
}

impl QuantisedBuf {
    /// The view that the kernels take.
    pub fn view(&self) -> Quantised<'_> {
        Quantised { layout: self.layout, data: &self.data, scales: &self.scales }
    }

    /// Data and scales.
    pub fn into_parts(self) -> (Vec<u8>, Vec<bf16>) {
        (self.data, self.scales)
    }
}
