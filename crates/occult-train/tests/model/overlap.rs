//! Exchange beside compute: the parts of a batch change nothing but rounding.

use occult_comm::Metered;
use occult_plan::cost::{Cluster, Compute, Link};

use super::*;

/// Links on which more than one part pays, for tokens however few.
fn without_latency() -> Overlap {
    Overlap::Auto(Box::new(Cluster {
        name: "test".into(),
        nodes: 1,
        ranks_per_node: 4,
        intra: Link { bandwidth_bytes_per_s: 1e9, latency_s: 0.0 },
        inter: None,
        compute: Compute { flops_per_s: 1e10, memory_bandwidth_bytes_per_s: 1e15 },
    }))
}

fn fresh_in_parts(overlap: &Overlap, case: &str, world: usize, limit: Option<usize>) -> Run {
    let dir = tempfile::tempdir().expect("directory");
    train_in_parts(overlap, case, world, limit, dir.path(), u64::MAX, false)
}

fn close_losses(found: &Run, expected: &Run, what: &str) {
    assert_eq!(found.1.len(), expected.1.len(), "{what}");
    for (a, b) in found.1.iter().zip(&expected.1) {
        assert!((a - b).abs() < 1e-4, "{what}: losses {a} and {b}");
    }
}

#[test]
fn parts_learn_what_the_whole_does_and_the_same_bits_again() {
    for case in CASES {
        for (world, limit) in [(2, None), (4, None), (4, Some(2))] {
            let whole = fresh(case, world, limit);
            for overlap in [Overlap::Chunks(2), without_latency()] {
                let what = format!("{case}, limit {limit:?}, {world} ranks, {overlap:?}");
                let parts = fresh_in_parts(&overlap, case, world, limit);
                close(&parts, &whole, 2e-4, &what);
                close_losses(&parts, &whole, &what);
                assert_eq!(fresh_in_parts(&overlap, case, world, limit), parts, "{what}");
            }
        }
    }
}

#[test]
fn every_part_is_an_exchange_forward_and_backward() {
    let calls = |overlap: &Overlap, limit: Option<usize>, what: &'static str| {
        let results = run_threads(2, &ThreadOptions::default(), |comm| {
            let metered = Metered::new(comm);
            let meter = metered.meter();
            let ranks = ranks("olmoe", Arc::new(metered)).with_overlap(overlap.clone());
            let mut model = MoeModel::read(&files("olmoe"), ranks, plain())?;
            model.set_limit(limit)?;
            meter.reset();
            model.loss_and_gradients(&batch(), 1.0)?;
            Ok::<_, TrainError>(meter.snapshot().operations[what].calls)
        });
        results.all().expect("all ranks").remove(0)
    };
    for what in ["moe dispatch", "moe combine gradients"] {
        for limit in [None, Some(1)] {
            let whole = calls(&Overlap::Off, limit, what);
            assert_eq!(calls(&Overlap::Chunks(3), limit, what), 3 * whole, "{what}");
            assert!(calls(&without_latency(), limit, what) > whole, "{what}");
        }
    }
}

#[test]
fn a_run_goes_on_to_the_bit_in_the_same_parts_and_closely_in_others() {
    let (case, world, limit) = ("olmoe", 2, Some(2));
    let parts = Overlap::Chunks(2);
    let whole = fresh_in_parts(&parts, case, world, limit);
    for (overlap, same) in [(Overlap::Chunks(2), true), (Overlap::Off, false)] {
        let dir = tempfile::tempdir().expect("directory");
        train_in_parts(&parts, case, world, limit, dir.path(), 5, false);
        let resumed = train_in_parts(&overlap, case, world, limit, dir.path(), u64::MAX, true);
        if same {
            assert_eq!((resumed.0, &resumed.1[..]), (whole.0.clone(), &whole.1[5..]));
        } else {
            close(&resumed, &whole, 2e-4, "resumed without overlap");
        }
    }
}
