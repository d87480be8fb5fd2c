//! What goes wrong: the link, the daemon, the servers.

use std::fmt;
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use sangam::faultlink::{AfterLoss, Mode};

use super::common::{Daemon, World};

/// Commands whose replies get lost after they were carried out.
const COMMANDS: [&str; 4] = ["update", "update", "delete", "commitTransaction"];

/// How often each fault struck.
#[derive(Debug, Default)]
pub struct Faults {
    aborted: u32,
    daemon_killed: u32,
    server_killed: u32,
    cut: u32,
    stalled: u32,
    replies_lost: u64,
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "daemon aborted {} and killed {} times, servers killed {}, link cut {} and stalled {}, {} replies lost",
            self.aborted,
            self.daemon_killed,
            self.server_killed,
            self.cut,
            self.stalled,
            self.replies_lost
        )
    }
}

/// Lets things go wrong for `limit`, then heals link and servers; the daemon may be dead after it.
pub async fn run(
    rng: &mut StdRng,
    world: &mut World,
    daemon: &mut Daemon,
    limit: Duration,
) -> Faults {
    let mut faults = Faults::default();
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        match rng.random_range(0..100) {
            0..15 => {
                faults.cut += 1;
                world.link.cut();
                pause(rng, 50..800).await;
                world.link.set(Mode::Pass);
            }
            15..28 => {
                faults.stalled += 1;
                world.link.set(Mode::Stall);
                pause(rng, 50..1500).await;
                // Half of the stalled lines recover, the others turn out to be dead.
                if rng.random_bool(0.5) {
                    world.link.cut();
                }
                world.link.set(Mode::Pass);
            }
            28..55 => {
                let command = COMMANDS[rng.random_range(0..COMMANDS.len())];
                let after = match rng.random_range(0..3) {
                    0 => AfterLoss::CutLink,
                    1 => AfterLoss::Silence,
                    _ => AfterLoss::Reset,
                };
                world.link.lose_next_reply(command, after);
                pause(rng, 100..700).await;
                world.link.disarm();
                world.link.set(Mode::Pass);
            }
            55..65 => {
                let rtt = rng.random_range(0..60);
                world.link.round_trip(Duration::from_millis(rtt));
            }
            65..80 => {
                faults.daemon_killed += 1;
                daemon.kill9();
                pause(rng, 0..300).await;
            }
            80..85 => {
                daemon.signal("STOP");
                pause(rng, 50..1000).await;
                daemon.signal("CONT");
            }
            85..90 => {
                faults.server_killed += 1;
                kill_server(rng, world).await;
            }
            _ => {}
        }
        pause(rng, 50..400).await;
        if let Some(status) = daemon.exit_status() {
            // Signal 6 is a failpoint's abort.
            faults.aborted +=
                u32::from(std::os::unix::process::ExitStatusExt::signal(&status) == Some(6));
            daemon.respawn();
        }
    }
    faults.replies_lost = world.link.lost_replies();
    world.link.heal();
    faults
}

async fn kill_server(rng: &mut StdRng, world: &mut World) {
    let local = rng.random_bool(0.5);
    let servers = world.own_servers();
    let server = if local {
        &mut servers.local
    } else {
        &mut servers.remote
    };
    server.kill9().expect("a server can be killed");
    server.restart().await.expect("a killed server comes back");
}

async fn pause(rng: &mut StdRng, millis: std::ops::Range<u64>) {
    tokio::time::sleep(Duration::from_millis(rng.random_range(millis))).await;
}
