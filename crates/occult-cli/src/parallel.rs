//! Layers are independent: do them on several threads, answer in order.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::Result;

/// `0..n` through `work` on up to `threads` threads; results in order. After an error no further item is started, and the
/// error of the lowest item that failed is returned.
pub(crate) fn map_ordered<T: Send>(
    n: usize,
    threads: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let results: Vec<Mutex<Option<Result<T>>>> = (0..n).map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, n.max(1)) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(slot) = results.get(i) else { break };
                    let result = work(i);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    *slot.lock().expect("a result is stored whole") = Some(result);
                }
            });
        }
    });
    results.into_iter().filter_map(|slot| slot.into_inner().expect("threads have ended")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_their_order_and_the_first_error_wins() {
        for threads in [1, 2, 7] {
            let squares = map_ordered(50, threads, |i| Ok(i * i)).unwrap();
            assert_eq!(squares, Vec::from_iter((0..50).map(|i| i * i)));
            let error = map_ordered(50, threads, |i| {
                anyhow::ensure!(i < 20, "item {i}");
                Ok(i)
            });
            assert_eq!(error.unwrap_err().to_string(), "item 20");
        }
        assert!(map_ordered(0, 4, |_| Ok(())).unwrap().is_empty());
    }
}
