//! The demo's folder: what is where, which ports it takes, and the configuration file.
//!
//! A folder named by `--dir` is kept and can be used again; it remembers its ports, for a replica
//! set knows its members by theirs. Without `--dir` the folder is temporary.

use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::data::DATABASE;
use crate::process::{Port, free_port};

/// What a folder remembers from one demo to the next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) local_port: u16,
    pub(super) remote_port: u16,
    pub(super) link_port: u16,
    pub(super) api_port: u16,
    /// Whether the local database has been filled.
    pub(super) filled: bool,
    /// Tours begun on these data.
    pub(super) tours: u32,
}

impl Memory {
    fn new() -> Result<Self> {
        let ports = [free_port()?, free_port()?, free_port()?, free_port()?];
        let [local_port, remote_port, link_port, api_port] = ports.each_ref().map(Port::number);
        Ok(Self {
            local_port,
            remote_port,
            link_port,
            api_port,
            filled: false,
            tours: 0,
        })
    }
}

/// The folder of a demo.
#[derive(Debug)]
pub(super) struct Place {
    dir: PathBuf,
    /// Removed at the end.
    temporary: bool,
    pub(super) memory: Memory,
    /// Held as long as this demo runs, so that no second one uses the folder.
    _lock: File,
}

impl Place {
    /// Opens (or makes) the folder `dir`, or makes a temporary one.
    pub(super) fn open(dir: Option<&Path>) -> Result<Self> {
        let (dir, temporary) = match dir {
            Some(dir) => (kept(dir)?, false),
            None => (temporary()?, true),
        };
        let lock = File::options()
            .create(true)
            .append(true)
            .open(dir.join("lock"))
            .with_context(|| format!("cannot write in {}", dir.display()))?;
        ensure!(
            lock.try_lock().is_ok(),
            "another demo is running in {}",
            dir.display()
        );
        let memory = match fs::read_to_string(dir.join(MEMORY)) {
            Ok(text) => serde_json::from_str(&text)
                .with_context(|| format!("{} is damaged", dir.join(MEMORY).display()))?,
            Err(error) if error.kind() == ErrorKind::NotFound => Memory::new()?,
            Err(error) => return Err(error).context("cannot read the demo's folder"),
        };
        let place = Self {
            dir,
            temporary,
            memory,
            _lock: lock,
        };
        place.remember()?;
        Ok(place)
    }

    /// Writes down what the folder remembers.
    pub(super) fn remember(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.memory)?;
        let new = self.dir.join("demo.new");
        fs::write(&new, text).and_then(|()| fs::rename(&new, self.dir.join(MEMORY)))?;
        Ok(())
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn is_temporary(&self) -> bool {
        self.temporary
    }

    /// Keeps a temporary folder, for a look at what went wrong.
    pub(super) fn keep(&mut self) {
        self.temporary = false;
    }

    pub(super) fn config_file(&self) -> PathBuf {
        self.dir.join("sangam.toml")
    }

    pub(super) fn log_file(&self) -> PathBuf {
        self.dir.join("sangam.log")
    }

    pub(super) fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub(super) fn control_file(&self) -> PathBuf {
        self.dir.join("control")
    }

    /// Where the daemon's API listens.
    pub(super) fn api_address(&self) -> String {
        format!("127.0.0.1:{}", self.memory.api_port)
    }

    /// Writes the daemon's configuration, readable by its owner alone, as it should be where it
    /// holds passwords.
    pub(super) fn write_config(&self, local_uri: &str, link_uri: &str) -> Result<()> {
        let path = self.config_file();
        let text = self.config(local_uri, link_uri)?;
        let _ = fs::remove_file(&path);
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn config(&self, local_uri: &str, link_uri: &str) -> Result<String> {
        let state_dir = quoted_path(&self.state_dir())?;
        let control = quoted_path(&self.control_file())?;
        let (local, remote) = (quoted(local_uri), quoted(link_uri));
        let api = quoted(&self.api_address());
        Ok(format!(
            r#"# Written by `sangam demo` at each start. config/sangam.toml explains every key.
database = "{DATABASE}"
state_dir = {state_dir}

[local]
uri = {local}

[remote]
# Not the cloud's own address: the demo's line to it, which can be cut.
uri = {remote}

[sync]
conflict_resolution_strategy = "manual"

# A person watches here, so everything is tried again sooner than in a real installation.
[probe]
interval = "1s"
timeout = "1s"

[retry]
initial = "100ms"
max = "1s"

[queue]
min_free_disk = "64MiB"

[control]
file = {control}

[api]
listen = {api}
"#
        ))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.temporary {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

const MEMORY: &str = "demo.json";

/// A folder that is to be kept: empty, new, or of an earlier demo.
fn kept(dir: &Path) -> Result<PathBuf> {
    let dir = std::path::absolute(dir).context("--dir")?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let is_empty = fs::read_dir(&dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .next()
        .is_none();
    if !is_empty && !dir.join(MEMORY).is_file() {
        bail!(
            "{} holds other things; name a new folder, or one of an earlier demo",
            dir.display()
        );
    }
    Ok(dir)
}

fn temporary() -> Result<PathBuf> {
    let root = std::env::temp_dir();
    loop {
        let dir = root.join(format!(
            "sangam-demo-{:06x}",
            rand::random_range(0..0x100_0000)
        ));
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot create {}", dir.display()));
            }
        }
    }
}

fn quoted_path(path: &Path) -> Result<String> {
    let text = path.to_str();
    let text = text.with_context(|| format!("{} is no UTF-8", path.display()))?;
    Ok(quoted(text))
}

/// A TOML string.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_kept_folder_remembers_and_a_temporary_one_goes() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a b/\"c\"");
        let mut place = Place::open(Some(&dir)).unwrap();
        place.memory.filled = true;
        place.remember().unwrap();
        let memory = place.memory.clone();
        drop(place);
        let again = Place::open(Some(&dir)).unwrap();
        assert_eq!(again.memory, memory);

        let place = Place::open(None).unwrap();
        let dir = place.dir().to_path_buf();
        assert!(dir.is_dir());
        drop(place);
        assert!(!dir.exists());
    }

    #[test]
    fn a_folder_in_use_or_with_other_things_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("demo");
        let _place = Place::open(Some(&dir)).unwrap();
        let second = Place::open(Some(&dir)).unwrap_err().to_string();
        assert!(second.starts_with("another demo is running"), "{second}");

        fs::write(parent.path().join("letter.txt"), "").unwrap();
        let other = Place::open(Some(parent.path())).unwrap_err().to_string();
        assert!(other.contains("holds other things"), "{other}");
    }

    #[test]
    fn the_configuration_is_toml_for_its_owner_alone() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("a \"quoted\\ name\"");
        let place = Place::open(Some(&dir)).unwrap();
        place.write_config("mongodb://a", "mongodb://b").unwrap();
        place
            .write_config("mongodb://local", "mongodb://link")
            .unwrap();

        let path = place.config_file();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = fs::read_to_string(path).unwrap();
        let toml: toml::Value = toml::from_str(&text).unwrap();
        assert_eq!(toml["database"].as_str(), Some(DATABASE));
        assert_eq!(toml["remote"]["uri"].as_str(), Some("mongodb://link"));
        assert_eq!(toml["state_dir"].as_str(), dir.join("state").to_str());
    }
}
