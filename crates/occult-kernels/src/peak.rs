//! What the machine can do, measured: the limits other figures are compared with.

use std::hint::black_box;
use std::time::Instant;

use crate::Threads;
use crate::core::isa::FMA_CHAINS;

/// Of one round.
const CALLS: usize = if cfg!(test) { 16 } else { 1 << 21 };

/// GFLOP/s of multiply-adds on all threads, for `rounds` rounds (a round is some 10 ms). The best round counts.
#[must_use]
pub fn fma_gflops(threads: &Threads, rounds: usize) -> f64 {
    let isa = threads.isa();
    let flop = 2.0 * (FMA_CHAINS * isa.lanes * CALLS * threads.count()) as f64;
    best(rounds, || {
        threads.for_each(threads.count(), |_| {
            // SAFETY: touches no memory, and the instructions are there because `isa` is.
            black_box(unsafe { (isa.fma_loop)(black_box(CALLS)) });
        });
    })
    .map_or(0.0, |seconds| flop / seconds / 1e9)
}

/// Runs the loop of [`fma_gflops`] for `rounds` rounds and returns the floating-point operations that it did: for whoever
/// measures several ranks at once, and so takes the time.
#[must_use]
pub fn fma_flop(threads: &Threads, rounds: usize) -> f64 {
    let isa = threads.isa();
    for _ in 0..rounds {
        threads.for_each(threads.count(), |_| {
            // SAFETY: touches no memory, and the instructions are there because `isa` is.
            black_box(unsafe { (isa.fma_loop)(black_box(CALLS)) });
        });
    }
    2.0 * (FMA_CHAINS * isa.lanes * CALLS * threads.count() * rounds) as f64
}

/// GOP/s of 8-bit products that are added up (a product and an addition count as two) on all threads, for `rounds`
/// rounds, with the instructions of [`quant::Isa::best`](crate::quant::Isa::best): `vpdpbusd`, or where there is only AVX2
/// `vpmaddwd` and an addition, which multiply half as many numbers, of 16 bits. `None` where there is neither. The best
/// round counts.
#[must_use]
pub fn int8_gops(threads: &Threads, rounds: usize) -> Option<f64> {
    int8_gops_with(crate::quant::Isa::best(), threads, rounds)
}

#[cfg(not(target_arch = "x86_64"))]
fn int8_gops_with(_: crate::quant::Isa, _: &Threads, _: usize) -> Option<f64> {
    None
}

/// Of the instructions of `isa`, which the processor has.
#[cfg(target_arch = "x86_64")]
fn int8_gops_with(isa: crate::quant::Isa, threads: &Threads, rounds: usize) -> Option<f64> {
    use crate::quant::Isa;
    let (run, products): (unsafe fn(usize) -> i32, usize) = match isa {
        Isa::Avx512Vnni => (dots::avx512_vnni, 64 * dots::CHAINS),
        Isa::AvxVnni => (dots::avx_vnni, 32 * dots::CHAINS),
        Isa::Avx2 => (dots::avx2, 16 * dots::CHAINS),
        Isa::Scalar => return None,
    };
    let ops = 2.0 * (products * CALLS * threads.count()) as f64;
    best(rounds, || {
        threads.for_each(threads.count(), |_| {
            // SAFETY: touches no memory, and the instructions are there.
            black_box(unsafe { run(black_box(CALLS)) });
        });
    })
    .map(|seconds| ops / seconds / 1e9)
}

/// `calls` times one addition of products to each of independent sums.
#[cfg(target_arch = "x86_64")]
mod dots {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Independent sums: no fewer than are under way at once, and with two operands no more than 16 registers hold.
    pub(super) const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn avx512_vnni(calls: usize) -> i32 {
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(2)));
        for _ in 0..calls {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_epi32(sum)).fold(0, i32::wrapping_add)
    }

    #[target_feature(enable = "avx2,avxvnni")]
    pub(super) fn avx_vnni(calls: usize) -> i32 {
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(2)));
        for _ in 0..calls {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
            }
        }
        first(sums)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(calls: usize) -> i32 {
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        let (a, b) = (_mm256_set1_epi16(black_box(3)), _mm256_set1_epi32(black_box(2)));
        for _ in 0..calls {
            for sum in &mut sums {
                // The sum is what is multiplied: a product of two constants would be taken out of the loop.
                *sum = _mm256_add_epi32(_mm256_madd_epi16(*sum, a), b);
            }
        }
        first(sums)
    }

    /// A value that every sum is needed for.
    #[target_feature(enable = "avx2")]
    fn first(sums: [__m256i; CHAINS]) -> i32 {
        let all = sums.into_iter().fold(_mm256_setzero_si256(), |all, sum| _mm256_add_epi32(all, sum));
        _mm256_extract_epi32::<0>(all)
    }
}

/// GB/s of reading `len_bytes` of memory from end to end on all threads, `rounds` times. The best round counts. With
/// much more than the last cache holds this is the speed of memory.
#[must_use]
pub fn read_gb_per_s(threads: &Threads, len_bytes: usize, rounds: usize) -> f64 {
    let data = vec![1.0_f32; len_bytes / size_of::<f32>()];
    let isa = threads.isa();
    let piece = 1 << 18;
    best(rounds, || {
        threads.for_each(data.len().div_ceil(piece), |task| {
            let part = &data[task * piece..data.len().min((task + 1) * piece)];
            // SAFETY: reads the values of `part`; the instructions are there because `isa` is.
            black_box(unsafe { (isa.read_loop)(part.len(), part.as_ptr()) });
        });
    })
    .map_or(0.0, |seconds| (data.len() * size_of::<f32>()) as f64 / seconds / 1e9)
}

/// Seconds of the fastest of `rounds` calls.
fn best(rounds: usize, mut call: impl FnMut()) -> Option<f64> {
    (0..rounds)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64()
        })
        .filter(|&seconds| seconds > 0.0)
        .min_by(f64::total_cmp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::InstructionSet;

    #[test]
    fn loops_run_on_every_instruction_set_and_read_what_is_there() {
        for set in InstructionSet::available() {
            let threads = Threads::new(2).with_instruction_set(set).expect("available");
            assert!(fma_gflops(&threads, 1) > 0.0 && fma_flop(&threads, 1) > 0.0, "{set:?}");
            for len in [0, 1, 127, 128, 1000] {
                let data = vec![1.0_f32; len];
                // SAFETY: reads the values of `data`; the set is available.
                let sum = unsafe { (threads.isa().read_loop)(len, data.as_ptr()) };
                // What does not fill two vectors of each stream is left out.
                let read = 4 * (len / 4 - len / 4 % (2 * threads.isa().lanes));
                assert_eq!(sum, read as f32, "{set:?} {len}");
            }
        }
    }

    #[test]
    fn products_of_8_bits_have_a_peak_wherever_they_have_instructions() {
        let threads = Threads::new(2);
        for isa in crate::quant::Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let gops = int8_gops_with(isa, &threads, 1);
            assert_eq!(gops.is_some(), isa != crate::quant::Isa::Scalar, "{isa:?}");
            assert!(gops.is_none_or(|gops| gops > 0.0), "{isa:?}");
        }
    }
}
