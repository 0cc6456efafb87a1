//! Threads: a first look; the conformance suite goes further.

use occult_comm::{Buffer, CommError, Expect, ThreadOptions, run_threads};

#[test]
fn uneven_exchange_brings_everybodys_part_in_order() {
    let results = run_threads(4, &ThreadOptions::default(), |comm| {
        let (me, world) = (comm.rank(), comm.world_size());
        let bytes: Vec<usize> = (0..world).map(|to| me * to).collect();
        let send: Vec<u8> = (0..world).flat_map(|to| vec![(10 * me + to) as u8; me * to]).collect();
        let expect = Expect::Bytes((0..world).map(|from| from * me).collect());
        let received = comm.exchange("rows", Buffer::from_slice(&send), &bytes, expect)?;
        let wanted: Vec<u8> = (0..world).flat_map(|from| vec![(10 * from + me) as u8; from * me]).collect();
        assert_eq!(received.buffer.as_bytes(), wanted);
        Ok::<_, CommError>(())
    });
    results.all().unwrap();
}

#[test]
fn an_error_of_one_rank_reaches_all() {
    let results = run_threads(3, &ThreadOptions::default(), |comm| {
        if comm.rank() == 1 {
            return Err(CommError::Memory { bytes: 7 });
        }
        comm.barrier("start")
    });
    assert_eq!(results.first_failure, Some(1));
    for rank in [0, 2] {
        let error = results.results[rank].as_ref().unwrap_err().to_string();
        assert!(error.contains("rank 1 failed: no memory for 7 bytes") && error.contains("start"), "{error}");
    }
}
