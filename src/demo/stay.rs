//! After the tour: where everything is, what to try, and a few commands on the terminal.

use std::io::BufRead;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use chrono::Utc;
use mongodb::bson::Document;
use tokio::sync::mpsc;

use super::daemon::Daemon;
use super::data::{Channel, Temple};
use super::judge;
use super::say::{Voice, count, thousands, time};
use super::stage::Stage;

/// Most bookings that one `book` makes.
const MOST_BOOKINGS: u32 = 100_000;
/// How long `back` watches the queue.
const WATCHED: Duration = Duration::from_secs(15);

/// A line typed on the terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Order {
    Cut,
    Back,
    Slow(Duration),
    Book(u32),
    Status,
    Compare,
    Start,
    Help,
    Quit,
    Nothing,
    Unknown(String),
}

impl Order {
    fn of(line: &str) -> Self {
        let mut words = line.split_whitespace();
        let order = words.next().map(str::to_ascii_lowercase);
        let number: Option<u32> = words.next().and_then(|word| word.parse().ok());
        match (order.as_deref(), number) {
            (None, _) => Self::Nothing,
            (Some("cut"), _) => Self::Cut,
            (Some("back"), _) => Self::Back,
            (Some("slow"), Some(ms @ ..=60_000)) => Self::Slow(Duration::from_millis(ms.into())),
            (Some("book"), number) => Self::Book(number.unwrap_or(1).min(MOST_BOOKINGS)),
            (Some("status"), _) => Self::Status,
            (Some("compare"), _) => Self::Compare,
            (Some("start"), _) => Self::Start,
            (Some("help" | "?"), _) => Self::Help,
            (Some("quit" | "exit" | "q"), _) => Self::Quit,
            _ => Self::Unknown(line.trim().to_owned()),
        }
    }
}

/// Stays up until told to quit; Ctrl-C is the caller's matter. The daemon may be killed and started
/// again meanwhile, so it is handed over and back.
pub(super) async fn stay(voice: &Voice, stage: &Stage, daemon: &mut Option<Daemon>) {
    tell_where(voice, stage, daemon.as_ref());
    let mut temple = Temple::new(rand::random(), Utc::now());
    let mut lines = typed();
    let mut look = tokio::time::interval(Duration::from_millis(300));
    loop {
        let line = tokio::select! {
            Some(line) = lines.recv() => line,
            _ = look.tick() => {
                if let Some(Err(error)) = daemon.as_ref().map(Daemon::must_run) {
                    voice.bad(&format!("{error:#}. Type `start` to start it again on the same state."));
                    *daemon = None;
                }
                continue;
            }
        };
        let done = match Order::of(&line) {
            Order::Nothing => Ok(()),
            Order::Quit => return,
            Order::Help => {
                help(voice);
                Ok(())
            }
            Order::Cut => {
                stage.cut();
                voice.good("The line is cut. `back` mends it.");
                Ok(())
            }
            Order::Back => back(voice, stage, daemon.as_ref()).await,
            Order::Slow(rtt) => {
                stage.link.round_trip(rtt);
                voice.good(&format!("The line takes {} there and back.", time(rtt)));
                Ok(())
            }
            Order::Book(number) => book(voice, stage, &mut temple, number).await,
            Order::Status => status(voice, daemon.as_ref()).await,
            Order::Compare => compare(voice, stage).await,
            Order::Start => start(voice, stage, daemon),
            Order::Unknown(line) => {
                voice.bad(&format!(
                    "“{line}” is not one of the commands; `help` lists them."
                ));
                Ok(())
            }
        };
        if let Err(error) = done {
            voice.bad(&format!("{error:#}"));
        }
    }
}

/// Lines from standard input. At its end (`< /dev/null`) the channel closes and nothing else happens.
fn typed() -> mpsc::UnboundedReceiver<String> {
    let (sender, receiver) = mpsc::unbounded_channel();
    // A thread, for a read from a terminal can't be cancelled; it ends with the process.
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

fn tell_where(voice: &Voice, stage: &Stage, daemon: Option<&Daemon>) {
    let place = &stage.place;
    let row = |what: &str, place: String| vec![what.to_owned(), place];
    let path = |path: std::path::PathBuf| path.display().to_string();
    voice.title(
        "It stays up.",
        "Everything is yours to play with until Ctrl-C.",
    );
    voice.table(
        &["", ""],
        &[
            row("temple (local)", stage.local_uri()),
            row("cloud (remote)", stage.remote_uri()),
            row("the line between", stage.link.uri()),
            row(
                "API",
                format!("http://{}/api/sync/status", place.api_address()),
            ),
            row("configuration", path(place.config_file())),
            row("log", path(place.log_file())),
            row("state", path(place.state_dir())),
            row("control file", path(place.control_file())),
        ],
        &[],
    );

    let sangam = format!("{} --config {}", program(), shell(&place.config_file()));
    let database = stage.local.name();
    let shell_uri = |uri: &str| {
        format!(
            "mongosh \"{}\"",
            uri.replacen("/?", &format!("/{database}?"), 1)
        )
    };
    voice.gap();
    voice.say("To try, in another terminal:");
    voice.command("how things are", &format!("{sangam} status"));
    voice.command("what waits", &format!("{sangam} queue"));
    voice.command("the last syncs", &format!("{sangam} logs"));
    voice.command("what needs you", &format!("{sangam} conflicts"));
    voice.command(
        "  decide one",
        &format!("{sangam} resolve ID --strategy keep_local --dry-run"),
    );
    voice.command("  the easy ones", &format!("{sangam} auto-resolve"));
    voice.command("sync now", &format!("{sangam} sync"));
    if let Some(daemon) = daemon {
        voice.command("the same", &format!("kill -USR1 {}", daemon.id()));
        voice.command("a crash", &format!("kill -9 {}", daemon.id()));
    }
    voice.command(
        "follow the log",
        &format!("tail -f {}", shell(&place.log_file())),
    );
    voice.command("write (mongosh)", &shell_uri(&stage.local_uri()));
    voice.command("  or in the cloud", &shell_uri(&stage.remote_uri()));
    voice.command(
        "  for instance",
        "db.bookings.insertOne({name: \"Asha\", updatedAt: new Date()})",
    );
    voice.gap();
    help(voice);
}

fn help(voice: &Voice) {
    voice.say("To type here, with Enter:");
    voice.command("cut · back", "cut the line, mend it");
    voice.command("slow 300", "let the line take 300 ms there and back");
    voice.command("book 1000", "make 1000 bookings at the counter");
    voice.command(
        "status · compare",
        "ask Sangam; compare both databases whole",
    );
    voice.command("start", "start Sangam again after you have killed it");
    voice.command("Ctrl-C", "end");
}

/// Mends the line and watches the queue for a while.
async fn back(voice: &Voice, stage: &Stage, daemon: Option<&Daemon>) -> Result<()> {
    let start = Instant::now();
    stage.mend();
    voice.good("The line is back.");
    let Some(daemon) = daemon else {
        return Ok(());
    };
    while start.elapsed() < WATCHED {
        let online = daemon.status().await?.link.state == "online";
        let waiting = daemon.waiting().await?;
        if waiting == 0 && online {
            voice.good(&format!(
                "The queue is empty, {} later.",
                time(start.elapsed())
            ));
            return Ok(());
        }
        voice.live(&format!("queue {}", thousands(waiting)));
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    voice.say("The queue is not empty yet; `status` tells how far it is.");
    Ok(())
}

async fn book(voice: &Voice, stage: &Stage, temple: &mut Temple, number: u32) -> Result<()> {
    let start = Instant::now();
    let bookings = stage.local.collection::<Document>("bookings");
    let made: Vec<Document> = (0..number)
        .map(|_| temple.booking(Channel::Counter).document)
        .collect();
    if !made.is_empty() {
        bookings.insert_many(&made).await?;
    }
    voice.good(&format!(
        "{} made in {}.",
        count(made.len() as u64, "booking"),
        time(start.elapsed())
    ));
    Ok(())
}

async fn status(voice: &Voice, daemon: Option<&Daemon>) -> Result<()> {
    let daemon = daemon.context("Sangam doesn't run; type `start`")?;
    let status = daemon.status().await?;
    voice.good(&format!(
        "The line is {}; {} in the queue, {} open.",
        status.link.state,
        count(daemon.waiting().await?, "document"),
        count(status.unresolved_conflicts, "conflict")
    ));
    Ok(())
}

async fn compare(voice: &Voice, stage: &Stage) -> Result<()> {
    let start = Instant::now();
    let found = stage.compare().await?;
    let conflicts = stage.open_conflicts().await?;
    let left = judge::unexplained(&found, &conflicts).len() as u64;
    let text = format!(
        "{} equal; {} in open conflicts, {} otherwise different. ({})",
        thousands(found.equal),
        thousands(found.differences.len() as u64 - left),
        thousands(left),
        time(start.elapsed())
    );
    match left {
        0 => voice.good(&text),
        _ => voice.bad(&text),
    }
    Ok(())
}

fn start(voice: &Voice, stage: &Stage, daemon: &mut Option<Daemon>) -> Result<()> {
    if daemon.is_some() {
        voice.good("It is running.");
        return Ok(());
    }
    let started = Daemon::start(&stage.place)?;
    voice.good(&format!("Started; its process is {}.", started.id()));
    *daemon = Some(started);
    Ok(())
}

/// This program as one can type it.
fn program() -> String {
    let Ok(own) = std::env::current_exe() else {
        return "sangam".into();
    };
    let on_path = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join("sangam") == own));
    if on_path {
        return "sangam".into();
    }
    let here = std::env::current_dir().unwrap_or_default();
    match own.strip_prefix(&here) {
        Ok(below) => shell(&Path::new(".").join(below)),
        Err(_) => shell(&own),
    }
}

/// A path as a word for the shell.
fn shell(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,@%".contains(c);
    if text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        for (line, order) in [
            ("cut", Order::Cut),
            ("  BACK ", Order::Back),
            ("slow 300", Order::Slow(Duration::from_millis(300))),
            ("slow", Order::Unknown("slow".into())),
            ("slow 999999", Order::Unknown("slow 999999".into())),
            ("book", Order::Book(1)),
            ("book 40", Order::Book(40)),
            ("book 4000000000", Order::Book(MOST_BOOKINGS)),
            ("", Order::Nothing),
            ("status now", Order::Status),
            ("q", Order::Quit),
            ("dance", Order::Unknown("dance".into())),
        ] {
            assert_eq!(Order::of(line), order, "{line:?}");
        }
    }

    #[test]
    fn paths_are_words_for_the_shell() {
        assert_eq!(
            shell(Path::new("/tmp/sangam-demo-1/x.toml")),
            "/tmp/sangam-demo-1/x.toml"
        );
        assert_eq!(shell(Path::new("/tmp/a b")), "'/tmp/a b'");
        assert_eq!(shell(Path::new("/tmp/it's")), r"'/tmp/it'\''s'");
    }
}
