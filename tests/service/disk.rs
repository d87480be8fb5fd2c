//! R22: a full disk and a queue at its limit degrade, are told, and are recovered from without help.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use crate::common::kit::{both, cut, heal};
use crate::common::{World, wait_for};
use mongodb::bson::doc;
use serde_json::Value;

fn says(notices: &Value, text: &str) -> bool {
    notices.to_string().contains(text)
}

#[tokio::test]
async fn r22_a_queue_at_its_limit_is_told_and_caught_up_by_comparing() {
    // GIVEN a queue that may hold a few thousand documents
    let world = World::new("limit").await;
    let settings = world.settings().set("queue.max_bytes", "\"1MiB\"");
    let daemon = world.start_with(settings).await;
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": -1}).await.unwrap();
    world.wait_converged(&daemon).await;
    // WHEN far more is written while the link is cut THEN that is told, and the app goes on
    cut(&world, &daemon).await;
    here.insert_many((0..7000).map(|n| doc! {"_id": n}))
        .await
        .unwrap();
    daemon
        .wait_status("notices", |n| says(n, "queue.max_bytes"))
        .await;
    here.insert_many((7000..7500).map(|n| doc! {"_id": n}))
        .await
        .unwrap();
    here.delete_one(doc! {"_id": -1}).await.unwrap();
    // WHEN the link is back THEN everything arrives, and the notice goes
    heal(&world, &daemon).await;
    wait_for("all arrive", async || {
        there.count_documents(doc! {}).await.unwrap() == 7500
    })
    .await;
    world
        .wait_converged_within(crate::common::kit::PATIENT, &daemon)
        .await;
    daemon
        .wait_status("notices", |n| !says(n, "queue.max_bytes"))
        .await;
    assert!(world.conflicts().await.is_empty());
}

/// A small file system of its own for a folder, where that is allowed; gone with it.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(folder: &'a Path) -> Option<Self> {
        std::fs::create_dir_all(folder).unwrap();
        let mount = ["-t", "tmpfs", "-o", "size=8m", "none"];
        let mounted = Command::new("mount").args(mount).arg(folder).output();
        mounted
            .is_ok_and(|o| o.status.success())
            .then_some(Self(folder))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).output();
    }
}

#[tokio::test]
async fn r22_a_full_disk_stops_nobody_and_is_recovered_from() {
    // GIVEN a state directory on a file system of 8 MiB
    let world = World::new("full").await;
    let folder = world.dir().join("state");
    let Some(_small) = Small::mount(&folder) else {
        eprintln!("no file system can be mounted here: not tested");
        return;
    };
    let settings = world.settings().set("queue.min_free_disk", "\"0B\"");
    let mut daemon = world.start_with(settings).await;
    let pid = daemon.pid();
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": "before"}).await.unwrap();
    world.wait_converged(&daemon).await;
    // WHEN it is filled to the brim, and apps on both sides go on
    let ballast = folder.join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    while file.write_all(&[7; 4096]).is_ok() {}
    let crowd = |from: i32| (from..from + 3000).map(|n| doc! {"_id": n, "v": "x".repeat(300)});
    here.insert_many(crowd(0)).await.unwrap();
    there.insert_many(crowd(3000)).await.unwrap();
    // THEN that is told, and the process stays
    daemon
        .wait_status("notices", |n| says(n, "state can't be written"))
        .await;
    assert!(daemon.exit_status().is_none(), "it goes on");
    // WHEN there is room again THEN everything arrives without help
    drop(file);
    std::fs::remove_file(&ballast).unwrap();
    for c in [&here, &there] {
        wait_for("all arrive", async || {
            c.count_documents(doc! {}).await.unwrap() == 6001
        })
        .await;
    }
    world
        .wait_converged_within(crate::common::kit::PATIENT, &daemon)
        .await;
    daemon
        .wait_status("notices", |n| !says(n, "state can't be written"))
        .await;
    assert!(world.conflicts().await.is_empty());
    assert_eq!(daemon.pid(), pid);
    daemon.kill9();
}

/// A folder that takes no write, not even into files that are open, until it is dropped: what a file
/// system does that has gone read-only. (To remount one is refused while a file is open for writing.)
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    /// `None` where this needs a right that we lack, or a file system that knows no such mark.
    fn freeze(folder: &'a Path) -> Option<Self> {
        let mut probe = std::fs::File::create(folder.join("probe")).unwrap();
        let frozen = Self(folder);
        frozen.mark("+i");
        probe.write_all(b"x").is_err().then_some(frozen)
    }

    fn mark(&self, how: &str) {
        // Where there is no such command, the probe tells.
        let _ = Command::new("chattr")
            .args(["-R", how])
            .arg(self.0)
            .output();
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.mark("-i");
    }
}

#[tokio::test]
async fn r22_a_state_directory_that_goes_read_only_stops_nobody_and_is_recovered_from() {
    // GIVEN a daemon at work
    let world = World::new("frozen").await;
    let mut daemon = world.start().await;
    let (pid, state) = (daemon.pid(), daemon.state_dir());
    let (here, there) = both(&world, "c");
    here.insert_one(doc! {"_id": "before"}).await.unwrap();
    world.wait_converged(&daemon).await;
    // WHEN its state directory takes no write any more, and apps on both sides go on
    let Some(frozen) = Frozen::freeze(&state) else {
        eprintln!("files can't be made immutable here (chattr +i): not tested");
        return;
    };
    here.insert_many((0..500).map(|n| doc! {"_id": n}))
        .await
        .unwrap();
    there
        .insert_many((500..1000).map(|n| doc! {"_id": n}))
        .await
        .unwrap();
    here.delete_one(doc! {"_id": "before"}).await.unwrap();
    // THEN status and log say so, the process stays, and nothing was moved without being on record
    daemon
        .wait_status("notices", |n| says(n, "state can't be written"))
        .await;
    daemon.wait_log("state can't be written").await;
    let said = daemon.settings.cli(&["status"]);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("state can't be written"), "{said}");
    assert!(daemon.exit_status().is_none(), "it goes on");
    // WHEN it can be written again THEN everything arrives without help
    drop(frozen);
    world
        .wait_converged_within(crate::common::kit::PATIENT, &daemon)
        .await;
    assert_eq!(here.count_documents(doc! {}).await.unwrap(), 1000);
    daemon
        .wait_status("notices", |n| !says(n, "state can't be written"))
        .await;
    assert!(world.conflicts().await.is_empty());
    assert_eq!(daemon.pid(), pid);
    assert!(daemon.exit_status().is_none());
}
