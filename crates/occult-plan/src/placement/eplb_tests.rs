use super::*;
use proptest::prelude::*;

const LAYERS: [[u64; 12]; 2] = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
];
const CONFIG: EplbConfig = EplbConfig { num_replicas: 16, num_groups: 4, num_nodes: 2, num_gpus: 8 };

/// The example of EPLB's README: two layers, twelve experts in four groups, sixteen slots on two nodes of four GPUs.
#[test]
fn golden_example() {
    let printed: [[u16; 16]; 2] = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ];
    for (loads, printed) in LAYERS.iter().zip(printed) {
        let layer = place(loads, CONFIG).unwrap();
        let golden = EplbLayer { num_experts: 12, num_gpus: 8, physical_to_logical: printed.to_vec() };
        assert_eq!(layer.gpu_loads(loads).unwrap(), golden.gpu_loads(loads).unwrap());
        assert_eq!(layer.physical_to_logical(), printed);
    }
}

#[test]
fn groups_that_do_not_divide_among_nodes_fall_back_to_the_global_policy() {
    let global = place(&LAYERS[0], EplbConfig { num_groups: 3, ..CONFIG }).unwrap();
    let flat = place(&LAYERS[0], EplbConfig { num_groups: 1, num_nodes: 1, ..CONFIG }).unwrap();
    assert_eq!(global, flat);
    assert_ne!(global, place(&LAYERS[0], CONFIG).unwrap());
}

/// Four experts, six slots, two GPUs, by hand. Loads 80 10 6 4: expert 0 gets both further replicas (80, then 40 per
/// replica), slots 0 1 2 3 0 0 with 26.7 10 6 4 26.7 26.7; heaviest first, in turn to the lighter GPU:
/// 0 -> GPU 0, 0 -> GPU 1, 0 -> GPU 0, 1 -> GPU 1, 2 -> GPU 1 (full), 3 -> GPU 0.
#[test]
fn replicas_that_meet_on_a_gpu_are_one_in_the_placement() {
    let config = EplbConfig { num_replicas: 6, num_groups: 1, num_nodes: 1, num_gpus: 2 };
    let layer = place(&[80, 10, 6, 4], config).unwrap();
    assert_eq!(layer.physical_to_logical(), [0, 0, 3, 0, 1, 2]);
    assert_eq!(layer.replica_counts(), [3, 1, 1, 1]);
    let placement = layer.to_placement().unwrap();
    assert_eq!(placement.experts_of(0), [0, 3]);
    assert_eq!(placement.experts_of(1), [0, 1, 2]);
}

#[test]
fn one_slot_per_gpu_keeps_the_order() {
    let config = EplbConfig { num_replicas: 4, num_groups: 1, num_nodes: 1, num_gpus: 4 };
    assert_eq!(place(&[1, 9, 3, 7], config).unwrap().physical_to_logical(), [0, 1, 2, 3]);
}

#[test]
fn impossible_numbers_are_named() {
    let refused = |config: EplbConfig| place(&LAYERS[0], config).unwrap_err().to_string();
    assert_eq!(
        refused(EplbConfig { num_replicas: 11, ..CONFIG }),
        "number of physical slots is 11, expected 12 (the number of experts) to 1048576"
    );
    assert_eq!(
        refused(EplbConfig { num_replicas: 17, ..CONFIG }),
        "number of physical slots is 17, expected a multiple of 8 GPUs"
    );
    assert_eq!(
        refused(EplbConfig { num_groups: 8, ..CONFIG }),
        "number of experts is 12, expected a multiple of 8 expert groups"
    );
    assert_eq!(
        refused(EplbConfig { num_groups: 3, num_nodes: 3, ..CONFIG }),
        "number of GPUs is 8, expected a multiple of 3 nodes"
    );
    assert!(refused(EplbConfig { num_replicas: usize::MAX, ..CONFIG }).contains("physical slots"));
    assert!(refused(EplbConfig { num_gpus: 0, ..CONFIG }).contains("GPUs is 0"));
    assert!(refused(EplbConfig { num_nodes: 0, ..CONFIG }).contains("nodes is 0"));
    assert!(refused(EplbConfig { num_groups: 0, ..CONFIG }).contains("groups is 0"));
    assert!(place(&[], CONFIG).is_err());
}

proptest! {
    #[test]
    fn keeps_its_promises(
        loads in prop::collection::vec(0u64..1000, 24),
        (num_groups, num_nodes) in prop::sample::select(vec![(1, 1), (4, 2), (6, 3), (12, 2), (8, 4), (3, 2)]),
        gpus_per_node in 1usize..4,
        extra in 0usize..3,
    ) {
        let num_gpus = num_nodes * gpus_per_node;
        let num_replicas = (24usize.div_ceil(num_gpus) + extra) * num_gpus;
        let config = EplbConfig { num_replicas, num_groups, num_nodes, num_gpus };
        let layer = place(&loads, config).unwrap();
        prop_assert_eq!(layer.physical_to_logical().len(), num_replicas);
        // No expert without a replica, and nothing of its load lost.
        let counts = layer.replica_counts();
        prop_assert!(counts.iter().all(|&n| n > 0));
        let total: f64 = layer.gpu_loads(&loads).unwrap().iter().sum();
        prop_assert!((total - loads.iter().sum::<u64>() as f64).abs() < 1e-6);
        layer.to_placement().unwrap();
        let hierarchical = num_groups % num_nodes == 0;
        if hierarchical {
            // Whole groups on nodes.
            let group_of = |e: u16| usize::from(e) / (24 / num_groups);
            let mut node_of_group = vec![None; num_groups];
            for (slot, &e) in layer.physical_to_logical().iter().enumerate() {
                let node = slot / (num_replicas / num_nodes);
                prop_assert_eq!(*node_of_group[group_of(e)].get_or_insert(node), node);
            }
        } else {
            // A replica was only granted where the load per replica was largest.
            for a in 0..24 {
                for b in 0..24 {
                    if counts[a] > 1 {
                        let before = loads[a] as f64 / (counts[a] - 1) as f64;
                        prop_assert!(before >= loads[b] as f64 / counts[b] as f64);
                    }
                }
            }
        }
    }
}
