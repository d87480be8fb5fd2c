//! The disk: a limit for the queue and a reserve of free space that is never touched (R22).
//!
//! At either limit capture keeps only the fact that something changed; the app is never stopped and
//! the disk never filled. When there is room again, a reconcile finds what was not queued.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::failure::{Class, Failure};
use crate::settle::store_failed;
use crate::shared::Shared;
use crate::store::queue;

/// How often the limits are looked at; at full speed the queue grows by a few MB in that time.
const EVERY: Duration = Duration::from_secs(2);

/// Bytes that a queued key is reckoned to take in the file, index entries included.
pub(crate) const ROW: u64 = 200;

/// What is told while the disk takes no write.
const REFUSED: &str = "the state can't be written: free some space on the disk of state_dir, or make it \
    writable; nothing is lost meanwhile, but nothing moves";

/// Runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    loop {
        let full = look(&shared).await?;
        if shared.degraded.swap(full.is_some(), Ordering::Relaxed) && full.is_none() {
            tracing::info!("there is room again; what was not queued is found by comparing");
            shared.reconcile.notify_one();
        }
        shared.notice("disk", full);
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// Which limit is reached, in words. Once reached, it is left with a tenth to spare.
async fn look(shared: &Shared) -> Result<Option<String>, Failure> {
    let limits = shared.settings().config.queue.clone();
    let slack = u64::from(shared.degraded.load(Ordering::Relaxed));
    let reserve = limits.min_free_disk + slack * limits.min_free_disk / 10;
    let most = limits.max_bytes - slack * limits.max_bytes / 10;
    if free_bytes(shared.store.dir()).is_some_and(|free| free < reserve) {
        return Ok(Some(format!(
            "the disk of state_dir has less than {} MiB left (queue.min_free_disk): changes are \
             no longer queued one by one; free some space, then everything is compared and \
             nothing is lost",
            limits.min_free_disk >> 20
        )));
    }
    if shared.store.is_refused().await.map_err(store_failed)? {
        return Ok(Some(REFUSED.to_owned()));
    }
    let counted = shared.store.call(queue::count_all);
    match counted.await.map_err(store_failed) {
        Ok(rows) if rows * ROW > most => Ok(Some(format!(
            "the queue has reached queue.max_bytes with {rows} documents: further changes are not \
             queued one by one; when the link is back everything is compared and nothing is lost"
        ))),
        Ok(_) => Ok(None),
        Err(failure) if failure.class == Class::Transient => Ok(Some(REFUSED.to_owned())),
        Err(failure) => Err(failure),
    }
}

/// Free space for us on the file system of a folder; `None` where it can't be told.
pub(crate) fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail * stat.f_frsize)
}

#[cfg(test)]
mod tests {
    #[test]
    fn free_space_is_told() {
        assert!(super::free_bytes(std::path::Path::new("/")).is_some_and(|b| b > 0));
        assert!(super::free_bytes(std::path::Path::new("/no/such/folder")).is_none());
    }
}
