//! `sangam demo`: two real databases, a line that fails, and Sangam between them, in one command.
//!
//! The demo brings everything itself: it fetches the MongoDB server if there is none, starts two
//! replica sets in a folder of its own, runs this very program as the daemon, and leads through a
//! tour that proves each sentence in the databases. Nothing outlives it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Error, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

mod daemon;
mod data;
mod judge;
mod place;
mod say;
mod stage;
mod stay;
mod tour;
mod watch;

use daemon::Daemon;
use place::Place;
use say::{Voice, count, time};
use stage::Stage;
use tour::Tour;

/// Exit code after Ctrl-C in the middle of the tour, as shells have it.
const INTERRUPTED: u8 = 130;
/// Lines of the daemon's log that are shown when something went wrong.
const LOG_LINES: usize = 20;

/// What the command line asks for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// End after the tour.
    pub once: bool,
    /// Folder for the data, which is kept; without it a temporary one is used and removed.
    pub dir: Option<PathBuf>,
}

/// How the story went.
enum End {
    /// To its end, or the person at the terminal has seen enough.
    Told,
    /// Ctrl-C before the end of the tour.
    Interrupted,
    /// Something didn't come true.
    Failed(Error),
}

/// Plays the demo. The exit code is 0 if the tour came true and, at its end, a full comparison found
/// both databases equal but for the conflicts it shows; 1 if not; 130 if it was interrupted.
pub async fn run(options: Options) -> Result<ExitCode> {
    let voice = Voice::new();
    let stop = stop_signals()?;
    voice.title(
        "Sangam",
        "two databases, one bad line, and what becomes of them",
    );
    let setting = Box::pin(set_the_stage(&voice, &options));
    let stage = match stop.run_until_cancelled(setting).await {
        None => return Ok(INTERRUPTED.into()),
        Some(Ok(stage)) => stage,
        Some(Err(error)) => {
            voice.bad(&format!("{error:#}"));
            return Ok(ExitCode::FAILURE);
        }
    };
    let mut stage = stage;
    let mut daemon = None;
    let end = Box::pin(play(&voice, &stage, &mut daemon, &options, &stop)).await;
    if let End::Failed(error) = &end {
        lament(&voice, &mut stage, daemon.as_ref(), error);
    }
    let stopped = Box::pin(strike(&voice, stage, daemon)).await;
    Ok(match (end, stopped) {
        (End::Interrupted, _) => INTERRUPTED.into(),
        (End::Told, Ok(())) => ExitCode::SUCCESS,
        (End::Failed(_), Ok(())) => ExitCode::FAILURE,
        (_, Err(error)) => {
            voice.bad(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    })
}

async fn set_the_stage(voice: &Voice, options: &Options) -> Result<Stage> {
    let place = Place::open(options.dir.as_deref())?;
    voice.say(
        "One database stands in a temple, at the end of a bad line. The other is in the cloud, where \
         the website and the people abroad write. Sangam keeps the two equal.",
    );
    voice.gap();
    let start = Instant::now();
    voice.live("starting two databases ...");
    let stage = Stage::set(place).await?;
    let mut rows = vec![];
    for (name, database, uri) in [
        ("temple", &stage.local, stage.local_uri()),
        ("cloud", &stage.remote, stage.remote_uri()),
    ] {
        let held = match stage::total(database).await? {
            0 => "empty".to_owned(),
            total => count(total, "document"),
        };
        rows.push(vec![name.to_owned(), uri, held]);
    }
    let line = format!(
        "{} there and back; the demo can cut it",
        time(stage::ROUND_TRIP)
    );
    rows.push(vec!["the line".to_owned(), line]);
    voice.table(&["", "", ""], &rows, &[]);
    voice.gap();
    voice.say(&format!(
        "Both are real MongoDB replica sets, started for this in {}.",
        time(start.elapsed())
    ));
    Ok(stage)
}

/// The tour and, unless it is to end with it, the time after. What was started is left in `daemon`.
async fn play(
    voice: &Voice,
    stage: &Stage,
    daemon: &mut Option<Daemon>,
    options: &Options,
    stop: &CancellationToken,
) -> End {
    let started = Instant::now();
    let running = match Daemon::start(&stage.place) {
        Ok(running) => daemon.insert(running),
        Err(error) => return End::Failed(error),
    };
    let tour = Box::pin(Tour::new(voice, stage, running).tell(started));
    tokio::select! {
        biased;
        () = stop.cancelled() => return End::Interrupted,
        error = running.ended() => return End::Failed(error),
        told = tour => {
            if let Err(error) = told {
                return End::Failed(error);
            }
        }
    }
    if !options.once {
        let staying = Box::pin(stay::stay(voice, stage, daemon));
        stop.run_until_cancelled(staying).await;
    }
    End::Told
}

/// Says what didn't come true, and what the daemon said last.
fn lament(voice: &Voice, stage: &mut Stage, daemon: Option<&Daemon>, error: &Error) {
    voice.gap();
    voice.bad(&format!("This did not come true: {error:#}."));
    let log = daemon
        .map(|daemon| daemon.log_tail(LOG_LINES))
        .unwrap_or_default();
    if !log.is_empty() {
        voice.say("The last lines of Sangam's log:");
        for line in log.lines() {
            voice.line(&format!("     {line}"));
        }
    }
    stage.place.keep();
    voice.say(&format!(
        "Everything is kept in {}.",
        stage.place.dir().display()
    ));
}

/// Stops all that was started, the daemon first.
async fn strike(voice: &Voice, stage: Stage, daemon: Option<Daemon>) -> Result<()> {
    voice.gap();
    voice.live("stopping ...");
    let dir = stage.place.dir().display().to_string();
    let temporary = stage.place.is_temporary();
    let daemon = match daemon {
        Some(daemon) => daemon.stop().await,
        None => Ok(()),
    };
    stage.stop().await?;
    voice.say(&match temporary {
        true => "Everything is stopped, and the demo's folder is removed.".to_owned(),
        false => format!("Everything is stopped; the data stay in {dir}."),
    });
    daemon
}

/// Cancelled by the first Ctrl-C, TERM or HUP; a second one ends the process at once, and its
/// children with it.
fn stop_signals() -> Result<CancellationToken> {
    let mut signals = [
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
        signal(SignalKind::hangup())?,
    ];
    let stop = CancellationToken::new();
    let first = stop.clone();
    tokio::spawn(async move {
        loop {
            let [interrupt, terminate, hangup] = &mut signals;
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            if first.is_cancelled() {
                std::process::exit(INTERRUPTED.into());
            }
            first.cancel();
        }
    });
    Ok(stop)
}
