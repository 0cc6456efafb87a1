//! Values and routings that tests share: everything is a function of a seed.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

use half::{bf16, f16};
use occult_kernels::smm::{ExpertDims, ExpertMatrices, GateUp};
use occult_kernels::{InstructionSet, Matrix, SparseRows, Threads};

/// A small generator (SplitMix64); tests need variety, not quality.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// In -1 .. 1.
    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

/// A type weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    F32,
    Bf16,
    F16,
}

pub const STORED: [Stored; 3] = [Stored::F32, Stored::Bf16, Stored::F16];

/// Values in front of every weight: nothing the kernels are given need be aligned.
pub const FRONT: usize = 1;

/// A weight that owns its values, behind [`FRONT`] others.
pub enum Weight {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Weight {
    pub fn new(rng: &mut Rng, stored: Stored, len: usize) -> Self {
        let values = rng.values(FRONT + len);
        match stored {
            Stored::F32 => Self::F32(values),
            Stored::Bf16 => Self::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            Stored::F16 => Self::F16(values.into_iter().map(f16::from_f32).collect()),
        }
    }

    /// Value `i` becomes `value`, rounded to the type.
    pub fn set(&mut self, i: usize, value: f32) {
        match self {
            Self::F32(values) => values[FRONT + i] = value,
            Self::Bf16(values) => values[FRONT + i] = bf16::from_f32(value),
            Self::F16(values) => values[FRONT + i] = f16::from_f32(value),
        }
    }

    pub fn matrix(&self) -> Matrix<'_> {
        match self {
            Self::F32(values) => Matrix::F32(&values[FRONT..]),
            Self::Bf16(values) => Matrix::Bf16(&values[FRONT..]),
            Self::F16(values) => Matrix::F16(&values[FRONT..]),
        }
    }
}

/// An unaligned slice between two values that nobody may write: an output that starts with `values`.
pub struct Guarded(Vec<f32>);

const GUARD: u32 = 0x7fc0_1234;

impl Guarded {
    pub fn new(values: &[f32]) -> Self {
        let guard = [f32::from_bits(GUARD)];
        Self([&guard, values, &guard].concat())
    }

    /// NaN everywhere: for results that must be written.
    pub fn unset(len: usize) -> Self {
        Self::new(&vec![f32::NAN; len])
    }

    pub fn values(&mut self) -> &mut [f32] {
        let end = self.0.len() - 1;
        &mut self.0[1..end]
    }

    /// The values, once it is sure that those around them were left alone.
    #[track_caller]
    pub fn checked(&self) -> &[f32] {
        let end = self.0.len() - 1;
        for at in [0, end] {
            assert_eq!(self.0[at].to_bits(), GUARD, "written outside the slice");
        }
        &self.0[1..end]
    }
}

/// A layer's experts with everything the sparse matmuls take.
pub struct Layer {
    pub rows: SparseRows,
    pub dims: ExpertDims,
    pub x: Vec<f32>,
    pub row_weights: Vec<f32>,
    pub weights: Vec<[Weight; 3]>,
}

impl Layer {
    /// Each of `num_rows` rows chooses each expert with chance `share`.
    pub fn new(
        seed: u64,
        stored: Stored,
        dims: ExpertDims,
        num_rows: usize,
        num_experts: usize,
        share: f64,
    ) -> Self {
        let mut rng = Rng(seed);
        let (mut offsets, mut row_idx) = (vec![0], Vec::new());
        for _ in 0..num_experts {
            // One expert in four gets nothing.
            let share = if rng.below(4) == 0 { 0.0 } else { share };
            let chosen = (0..num_rows as u32).filter(|_| (rng.value() as f64 + 1.0) / 2.0 < share);
            row_idx.extend(chosen.collect::<Vec<_>>());
            offsets.push(row_idx.len() as u32);
        }
        let x = rng.values(num_rows * dims.hidden);
        let row_weights = rng.values(row_idx.len());
        let len = dims.hidden * dims.intermediate;
        let weights =
            (0..num_experts).map(|_| std::array::from_fn(|_| Weight::new(&mut rng, stored, len))).collect();
        let rows = SparseRows::new(num_rows, offsets, row_idx).unwrap();
        Self { rows, dims, x, row_weights, weights }
    }

    pub fn up(&self) -> Vec<GateUp<'_>> {
        self.weights.iter().map(|[gate, up, _]| GateUp { gate: gate.matrix(), up: up.matrix() }).collect()
    }

    pub fn down(&self) -> Vec<Matrix<'_>> {
        self.weights.iter().map(|[.., down]| down.matrix()).collect()
    }

    pub fn experts(&self) -> Vec<ExpertMatrices<'_>> {
        self.weights
            .iter()
            .map(|[gate, up, down]| ExpertMatrices {
                gate: gate.matrix(),
                up: up.matrix(),
                down: down.matrix(),
            })
            .collect()
    }
}

/// A budget for every instruction set of this machine.
pub fn budgets(count: usize) -> Vec<Threads> {
    let threads = Threads::new(count);
    InstructionSet::available().into_iter().map(|set| threads.with_instruction_set(set).unwrap()).collect()
}

/// What must not differ at all, not even in the sign of a zero.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Fewer values than this may all be small by chance, because their terms cancel.
const FEW: usize = 16;

/// Compares values that were added in different orders: apart by no more than 1e-5 of the largest; few values by no more than
/// 1e-5 of their terms, which are of order one as all inputs are.
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_close_or(what, found, expected, least_of(expected.len()));
}

/// What to take for the largest of so many values, at least.
pub fn least_of(values: usize) -> f32 {
    if values < FEW { 1.0 } else { 0.0 }
}

/// Apart by no more than 1e-5 of the largest, or of `least` where that is more.
#[track_caller]
pub fn assert_close_or(what: &str, found: &[f32], expected: &[f32], least: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().filter(|x| x.is_finite()).fold(least, |max, x| max.max(x.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let same = found == expected || (found.is_nan() && expected.is_nan());
        let close = (found - expected).abs() <= 1e-5 * largest;
        assert!(same || close, "{what}: value {i} is {found}, expected {expected}, largest {largest}");
    }
}
