//! The control file: whoever may write it commands the daemon without a program or a password.
//!
//! A line is a command. The daemon looks twice a second, empties the file, carries the lines out in
//! order, and writes what came of each into `FILE.result`, one line for each line, replaced whole so
//! that a reader never sees half of it. Polling instead of inotify, which misses renames on bind
//! mounts: folder and file may vanish, come back, be replaced or truncated at any time.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::fs;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::adopt::Mode;
use crate::command::Command;
use crate::dispatch::Dispatcher;

const POLL: Duration = Duration::from_millis(400);

/// More than this is no list of commands.
const MOST_BYTES: u64 = 64 * 1024;
/// Mode of the files that we make.
const MODE: u32 = 0o600;

/// Watches the file until cancelled.
pub async fn run(path: PathBuf, dispatcher: Dispatcher, cancel: CancellationToken) {
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    make(&path).await;
    let mut watched = Watched::new(path);
    let mut complained = false;
    while cancel.run_until_cancelled(ticks.tick()).await.is_some() {
        match watched.take().await {
            Ok(lines) if lines.is_empty() => complained = false,
            Ok(lines) => {
                let (path, dispatcher) = (watched.path.clone(), dispatcher.clone());
                // A long sync must not keep a later `pause` waiting.
                tokio::spawn(async move { answer(&path, &lines, &dispatcher).await });
            }
            Err(error) if !complained => {
                tracing::warn!(path = %watched.path.display(), %error, "the control file can't be read and emptied");
                complained = true;
            }
            Err(_) => {}
        }
    }
}

async fn answer(path: &Path, lines: &[String], dispatcher: &Dispatcher) {
    let mut answers = String::new();
    for line in lines {
        let answer = match parse(line) {
            Ok(command) => dispatcher.execute_to_line(command).await,
            Err(error) => format!("error: {error}"),
        };
        tracing::info!(line, "control file: {answer}");
        answers.push_str(&answer);
        answers.push('\n');
    }
    if let Err(error) = write_result(path, &answers).await {
        tracing::warn!(path = %path.display(), %error, "the answer to the control file can't be written");
    }
}

/// A line of the control file as a command; the error names the commands there are.
pub fn parse(line: &str) -> Result<Command, String> {
    let mut words = line.split_whitespace();
    let name = words.next().unwrap_or_default();
    let rest: Vec<String> = words.map(str::to_owned).collect();
    let command = match name {
        "sync" => return Ok(Command::Sync { collections: rest }),
        "pause" => Command::Pause,
        "resume" => Command::Resume,
        "reload" => Command::Reload,
        "status" => Command::Status,
        "reconcile" => match rest.as_slice() {
            [adopt, mode @ ..] if adopt == "--adopt" => {
                let mode = match mode {
                    [] => Some(Mode::Merge),
                    [mode] => Mode::named(mode),
                    _ => None,
                };
                let Some(mode) = mode else {
                    return Err("write reconcile --adopt local, remote or merge".into());
                };
                let who = "control file".into();
                return Ok(Command::Adopt { mode, who });
            }
            [] => Command::Reconcile { exact: false },
            [word] if word == "exact" => return Ok(Command::Reconcile { exact: true }),
            _ => return Err(
                "`reconcile` takes nothing after it but `exact` or `--adopt local|remote|merge`"
                    .into(),
            ),
        },
        _ => {
            let name: String = name.chars().take(40).collect();
            return Err(format!(
                "there is no command {name:?}; write sync, sync COLLECTION ..., pause, resume, reload, \
                 reconcile or status"
            ));
        }
    };
    if rest.is_empty() {
        Ok(command)
    } else {
        Err(format!("`{name}` takes nothing after it"))
    }
}

struct Watched {
    path: PathBuf,
    /// Length when last seen with an unfinished last line.
    unfinished: Option<u64>,
}

impl Watched {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            unfinished: None,
        }
    }

    /// Takes what stands in the file and empties it. A missing file is an empty one. A last line
    /// without an end is taken only if it hasn't grown since the last look.
    async fn take(&mut self) -> io::Result<Vec<String>> {
        let seen = match fs::metadata(&self.path).await {
            Ok(seen) if seen.is_file() && seen.len() > 0 => seen,
            Ok(_) => return Ok(Vec::new()),
            Err(error) if is_missing(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut options = fs::OpenOptions::new();
        let mut file = match options.read(true).write(true).open(&self.path).await {
            Ok(file) => file,
            Err(error) if is_missing(&error) => return Ok(Vec::new()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return self.take_away(seen.len()).await;
            }
            Err(error) => return Err(error),
        };
        if seen.len() > MOST_BYTES {
            file.set_len(0).await?;
            return Err(io::Error::other(format!(
                "it held {} bytes and was emptied",
                seen.len()
            )));
        }
        let mut bytes = Vec::new();
        loop {
            let before = bytes.len();
            file.seek(io::SeekFrom::Start(before as u64)).await?;
            (&mut file).take(MOST_BYTES).read_to_end(&mut bytes).await?;
            // Read again what was appended meanwhile, so that emptying doesn't lose it.
            if bytes.len() == before || bytes.len() as u64 > MOST_BYTES {
                break;
            }
        }
        let length = bytes.len() as u64;
        if !bytes.ends_with(b"\n") && self.unfinished != Some(length) {
            self.unfinished = Some(length);
            return Ok(Vec::new());
        }
        self.unfinished = None;
        file.set_len(0).await?;
        Ok(lines(&bytes))
    }

    /// A file that someone else made and that we may read but not write is removed instead of
    /// emptied; its folder is ours.
    async fn take_away(&mut self, length: u64) -> io::Result<Vec<String>> {
        let bytes = if length > MOST_BYTES {
            Vec::new()
        } else {
            fs::read(&self.path).await?
        };
        fs::remove_file(&self.path).await?;
        Ok(lines(&bytes))
    }
}

/// Bytes that are no UTF-8 make a bad command, not an error.
fn lines(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Makes an empty file of our own, so that one that root writes into can be emptied by us. Not made:
/// no harm, it is looked for all the same.
async fn make(path: &Path) {
    if fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(MODE)
        .open(path)
        .await
        .is_ok()
    {
        tracing::debug!(path = %path.display(), "made the control file");
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

async fn write_result(path: &Path, answers: &str) -> io::Result<()> {
    let beside = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    // Who may give orders may read the answers; they name collections.
    let mode = match fs::metadata(path).await {
        Ok(about) => about.permissions().mode() & 0o666,
        Err(_) => MODE,
    };
    let mut file = fs::OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(mode)
        .open(beside(".result.new"))
        .await?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))
        .await?;
    file.write_all(answers.as_bytes()).await?;
    file.flush().await?;
    fs::rename(beside(".result.new"), beside(".result")).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_commands_or_say_what_there_is() {
        assert_eq!(
            parse("sync"),
            Ok(Command::Sync {
                collections: vec![]
            })
        );
        let two = Command::Sync {
            collections: vec!["admins".into(), "bookings".into()],
        };
        assert_eq!(parse("  sync admins\tbookings "), Ok(two));
        assert_eq!(parse("pause"), Ok(Command::Pause));
        assert!(parse("pause now").unwrap_err().contains("takes nothing"));
        assert!(parse("Sync!").unwrap_err().contains("no command \"Sync!\""));
        assert!(parse(&"x".repeat(9999)).unwrap_err().len() < 200);
    }

    #[tokio::test]
    async fn a_file_is_taken_whole_and_emptied() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/control");
        let mut watched = Watched::new(path.clone());
        assert!(watched.take().await.unwrap().is_empty(), "no folder");

        std::fs::create_dir(folder.path().join("sub")).unwrap();
        assert!(watched.take().await.unwrap().is_empty(), "no file");

        std::fs::write(&path, "pause\r\n\n resume\n").unwrap();
        assert_eq!(watched.take().await.unwrap(), ["pause", "resume"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"");

        std::fs::write(folder.path().join("new"), "status\n").unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
        assert_eq!(watched.take().await.unwrap(), ["status"]);

        std::fs::write(&path, b"\xff\xfe\n").unwrap();
        assert_eq!(
            watched.take().await.unwrap().len(),
            1,
            "no UTF-8 is a bad command, not an error"
        );

        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(
            watched.take().await.unwrap().is_empty(),
            "a folder in its place"
        );
    }

    #[tokio::test]
    async fn a_last_line_without_end_is_taken_at_the_second_look() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let mut watched = Watched::new(path.clone());
        std::fs::write(&path, "sy").unwrap();
        assert!(watched.take().await.unwrap().is_empty());
        std::fs::write(&path, "sync").unwrap();
        assert!(watched.take().await.unwrap().is_empty(), "it has grown");
        assert_eq!(watched.take().await.unwrap(), ["sync"]);
    }

    #[tokio::test]
    async fn a_file_that_is_not_ours_is_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        std::fs::write(&path, "pause\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
        // Root may write it all the same, and then empties it.
        assert_eq!(Watched::new(path.clone()).take().await.unwrap(), ["pause"]);
        assert_eq!(std::fs::read(&path).unwrap_or_default(), b"");

        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, "resume\n").unwrap();
        let taken = Watched::new(path.clone()).take_away(7).await;
        assert!(taken.is_ok_and(|lines| lines == ["resume"]) && !path.exists());
    }

    #[tokio::test]
    async fn something_huge_is_emptied_and_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        std::fs::write(&path, vec![b'x'; 100_000]).unwrap();
        assert!(Watched::new(path.clone()).take().await.is_err());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }

    #[tokio::test]
    async fn the_result_is_replaced_whole_and_read_by_who_may_give_orders() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let result = folder.path().join("control.result");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        write_result(&path, "one\n").await.unwrap();
        assert_eq!(mode(&result), 0o600);
        make(&path).await;
        assert_eq!(mode(&path), 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).unwrap();
        write_result(&path, "two\n").await.unwrap();
        assert_eq!(mode(&result), 0o660);
        assert_eq!(std::fs::read_to_string(result).unwrap(), "two\n");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
