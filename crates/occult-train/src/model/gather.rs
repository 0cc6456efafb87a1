//! Values of experts from the ranks that have them.

use std::collections::BTreeMap;

use occult_comm::{Buffer, Communicator};

use crate::error::{Result, TrainError};

/// A parameter's values of the experts `wanted`, in their order. Every rank gives those of the experts `ids` that it has, and
/// may want others (collective).
pub(super) fn experts(
    comm: &dyn Communicator,
    name: &str,
    (ids, values): (&[u32], &[f32]),
    wanted: &[u32],
) -> Result<Vec<f32>> {
    let gather = |what, mine| {
        comm.all_gather(what, mine).map_err(|e| TrainError::model(format!("gathering experts of {name}"), e))
    };
    let all_ids = gather("ids of experts", Buffer::from_slice(ids))?;
    let all_values = gather("experts of a layer", Buffer::from_slice(values))?;
    let mut found = BTreeMap::new();
    for (rank, (ids, part)) in all_ids.iter().zip(&all_values).enumerate() {
        let wrong = || TrainError::request(format!("{name}: {} bytes of rank {rank}", part.len_bytes()));
        let ids = ids.try_as_slice::<u32>().ok_or_else(wrong)?;
        let values = part.try_as_slice::<f32>().ok_or_else(wrong)?;
        let each = values.len() / ids.len().max(1);
        if values.len() != ids.len() * each {
            return Err(wrong());
        }
        found.extend(ids.iter().zip(values.chunks_exact(each.max(1))));
    }
    let mut out = vec![];
    for id in wanted {
        let values = found.get(id);
        let values = values.ok_or_else(|| TrainError::request(format!("{name}: no rank has expert {id}")))?;
        out.extend_from_slice(values);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use occult_comm::{ThreadOptions, run_threads};

    #[test]
    fn every_rank_gets_the_experts_it_wants() {
        let results = run_threads(3, &ThreadOptions::default(), |comm| {
            let rank = comm.rank();
            // Rank 1 has none.
            let have: &[u32] = [&[4, 1][..], &[], &[0]][rank];
            let values: Vec<f32> = have.iter().flat_map(|&e| [e as f32, -(e as f32)]).collect();
            let wanted: &[u32] = [&[][..], &[0, 1], &[4]][rank];
            experts(&*comm, "w", (have, &values), wanted)
        });
        let all = results.all().expect("all ranks");
        assert_eq!(all, [vec![], vec![0.0, -0.0, 1.0, -1.0], vec![4.0, -4.0]]);
        let alone = occult_comm::SoloComm::new();
        let absent = experts(&alone, "w", (&[2], &[1.0]), &[3]).expect_err("absent");
        assert_eq!(absent.to_string(), "w: no rank has expert 3");
        assert!(experts(&alone, "w", (&[2, 3], &[1.0; 3]), &[3]).is_err(), "values of one and a half");
    }
}
