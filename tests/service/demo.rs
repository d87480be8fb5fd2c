//! The demo, played by the real binary: it tells its story to the end, twice on the same data, takes
//! orders while it stays up, and leaves nothing behind.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use sangam::process::Child;
use tempfile::TempDir;

/// A whole tour takes about 20 s on a free machine.
const TOUR: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(30);

/// A demo with a home and a temporary folder of its own.
struct Demo {
    child: Child,
    stdin: Option<ChildStdin>,
    dir: TempDir,
}

impl Demo {
    fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("sangam-test-")
            .tempdir()
            .unwrap();
        Self::start_in(dir, arguments)
    }

    fn start_in(dir: TempDir, arguments: &[&str]) -> Self {
        fs::create_dir_all(dir.path().join("tmp")).unwrap();
        let out = File::create(dir.path().join("out")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_sangam"));
        command
            .arg("demo")
            .args(arguments)
            .current_dir(dir.path())
            .env("TMPDIR", dir.path().join("tmp"))
            // The demo's daemon must not listen to these.
            .env("MONGODB_CLOUD_URL", "mongodb://127.0.0.1:1/")
            .env("DATABASE_NAME", "somebody_elses")
            .stdin(Stdio::piped())
            .stdout(out.try_clone().unwrap())
            .stderr(out);
        let mut child = Child::spawn(&mut command).unwrap();
        let stdin = child.take_stdin();
        Self { child, stdin, dir }
    }

    fn said(&self) -> String {
        fs::read_to_string(self.dir.path().join("out")).unwrap()
    }

    /// How often it has said this, wherever the lines are broken.
    fn times_said(&self, text: &str) -> usize {
        in_one_line(&self.said()).matches(text).count()
    }

    fn type_in(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits until the demo has said this at least so many times.
    async fn wait_said(&mut self, text: &str, times: usize, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.times_said(text) < times {
            let running = self.child.is_running();
            let said = self.said();
            assert!(
                running && Instant::now() < deadline,
                "not said: {text:?} (running: {running})\n{said}"
            );
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Types a line until the answer is this: what was cut may be noticed once more when it is back.
    async fn say_until(&mut self, line: &str, text: &str) {
        let deadline = Instant::now() + SOON;
        while self.times_said(text) == 0 {
            let said = self.said();
            assert!(Instant::now() < deadline, "not said: {text:?}\n{said}");
            self.type_in(line);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Waits for the end; the exit code and everything said.
    async fn end(&mut self) -> (Option<i32>, String) {
        let status = self.child.wait(TOUR).await.unwrap();
        let said = self.said();
        let status = status.unwrap_or_else(|| panic!("the demo doesn't end\n{said}"));
        (status.code(), said)
    }
}

fn in_one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ")
}

/// What is left in the temporary folder, and processes that still use it.
fn left_behind(dir: &Path) -> (Vec<PathBuf>, Vec<String>) {
    let files = fs::read_dir(dir.join("tmp")).unwrap();
    let files = files.map(|entry| entry.unwrap().path()).collect();
    let needle = dir.to_str().unwrap();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let running = processes
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(needle))
        .collect();
    (files, running)
}

#[tokio::test]
async fn the_tour_comes_true_and_leaves_nothing_behind() {
    let mut demo = Demo::start(&["--once"]);
    let (code, said) = demo.end().await;
    assert_eq!(code, Some(0), "{said}");
    let story = in_one_line(&said);
    for sentence in [
        "documents in 11 collections are in the cloud",
        "In the cloud after",
        "In the temple after",
        "Sangam notices after",
        "The queue grows:",
        "231 documents wait",
        "231 sent, 45 fetched",
        "Both databases are equal, and the queue is empty.",
        "Merged on both sides",
        "One conflict on record",
        "documents are equal on both sides.",
        "belongs to 1 open conflict",
        "the demo's folder is removed",
    ] {
        assert!(
            story.contains(sentence),
            "{sentence:?} is missing in\n{said}"
        );
    }
    assert!(!said.contains('\u{1b}'), "no colours when piped\n{said}");
    assert!(
        said.lines().all(|line| line.chars().count() <= 100),
        "{said}"
    );
    let left = left_behind(demo.dir.path());
    assert_eq!(left, (vec![], vec![]), "{said}");
}

#[tokio::test]
async fn a_kept_folder_is_gone_on_with_and_takes_orders_while_it_stays_up() {
    let mut demo = Demo::start(&["--once", "--dir", "kept"]);
    let (code, said) = demo.end().await;
    assert_eq!(code, Some(0), "{said}");

    let mut demo = Demo::start_in(demo.dir, &["--dir", "kept"]);
    demo.wait_said("Ctrl-C end", 1, TOUR).await;
    assert!(
        demo.times_said("belongs to 2 open conflicts") == 1,
        "{}",
        demo.said()
    );
    demo.type_in("cut");
    demo.type_in("book 30");
    demo.wait_said("30 bookings made", 1, SOON).await;
    demo.type_in("compare");
    demo.wait_said("30 otherwise different", 1, SOON).await;
    demo.type_in("back");
    demo.wait_said("The queue is empty,", 1, SOON).await;
    demo.type_in("compare");
    demo.wait_said(" 0 otherwise different", 1, SOON).await;
    demo.say_until("status", "The line is online; 0 documents in the queue")
        .await;
    demo.child.signal("INT").unwrap();
    let (code, said) = demo.end().await;
    assert_eq!(code, Some(0), "{said}");
    assert!(in_one_line(&said).contains("the data stay in"), "{said}");
    let left = left_behind(demo.dir.path());
    assert_eq!(left, (vec![], vec![]), "{said}");
}

#[tokio::test]
async fn ctrl_c_in_the_middle_ends_everything() {
    let mut demo = Demo::start(&[]);
    demo.wait_said("The first sync", 1, TOUR).await;
    demo.child.signal("INT").unwrap();
    let (code, said) = demo.end().await;
    assert_eq!(code, Some(130), "{said}");
    let left = left_behind(demo.dir.path());
    assert_eq!(left, (vec![], vec![]), "{said}");
}
