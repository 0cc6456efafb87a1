//! What waiting costs and how fast data move, over MPI: `mpirun -n 4 wait_and_move`, or over four threads:
//! `wait_and_move threads`.

use std::time::{Duration, Instant};

use occult_comm::{
    Buffer, CommError, Communicator, Expect, MpiOptions, ThreadOptions, end_mpi, leave_mpi, run_mpi,
    run_threads,
};

fn main() {
    if std::env::args().nth(1).as_deref() == Some("threads") {
        run_threads(4, &ThreadOptions::default(), |comm| measure(&*comm)).all().expect("threads work");
    } else if let Err(error) = run_mpi(&MpiOptions::default(), |comm| measure(&*comm)) {
        eprintln!("{error}");
        leave_mpi(1, Duration::from_secs(1));
    }
    end_mpi(0);
}

/// CPU seconds of this process so far.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    // User and system time, in hundredths of a second.
    fields.iter().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn measure(comm: &dyn Communicator) -> Result<(), CommError> {
    let num_ranks = comm.world_size();
    comm.barrier("start")?;
    let (before, start) = (cpu_seconds(), Instant::now());
    if comm.rank() + 1 == num_ranks {
        std::thread::sleep(Duration::from_secs(5));
    }
    comm.barrier("late")?;
    let seconds = start.elapsed().as_secs_f64();
    let mut cores = [(cpu_seconds() - before) / seconds];
    comm.all_reduce_sum_f64("cores", &mut cores)?;
    if comm.rank() == 0 {
        println!("waiting: {:.3} cores, all processes together (threads: count once)", cores[0]);
    }
    for (bytes, repeats) in [(0, 300), (1 << 10, 300), (16 << 10, 200), (256 << 10, 50), (4 << 20, 8)] {
        let counts = vec![bytes; num_ranks];
        let mut times = Vec::new();
        for _ in 0..repeats {
            let send = Buffer::zeroed::<u8>(bytes * num_ranks);
            comm.barrier("ready")?;
            let start = Instant::now();
            comm.exchange("move", send, &counts, Expect::Bytes(counts.clone()))?;
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        if comm.rank() == 0 {
            println!("{bytes:>8} bytes to each rank: {:.1} us (median)", 1e6 * times[repeats / 2]);
        }
    }
    Ok(())
}
