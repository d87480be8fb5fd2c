//! Child processes that never outlive this one: database servers, and the daemon in demo and tests.
//!
//! A dropped [`Child`] kills its process. If this process dies first (even by `kill -9`), a shell
//! that reads from a pipe of ours sees the end of it and kills the process instead. A process gets
//! a group of its own, so Ctrl-C in a terminal reaches us alone and we can stop it in order.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How often a process that is to end is looked at.
const POLL: Duration = Duration::from_millis(10);

/// A running process that is killed when this value is dropped or this process dies.
#[derive(Debug)]
pub struct Child {
    process: std::process::Child,
    /// Holds the pipe whose end means that we are gone.
    watcher: Option<std::process::Child>,
    status: Option<ExitStatus>,
}

impl Child {
    /// Starts `command` in a process group of its own.
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        let process = command.process_group(0).spawn()?;
        let watcher = Command::new("sh")
            .args(["-c", "read -r _; kill -9 \"$0\""])
            .arg(process.id().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        let mut child = Self {
            process,
            watcher: None,
            status: None,
        };
        // On failure `child` is dropped, and the process with it.
        child.watcher = Some(watcher?);
        Ok(child)
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The pipe to the process's standard input, if it was started with one; once.
    pub fn take_stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.process.stdin.take()
    }

    /// How the process ended; `None` while it runs.
    pub fn exit_status(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.process.try_wait()?;
            if self.status.is_some() {
                self.dismiss_watcher();
            }
        }
        Ok(self.status)
    }

    /// Whether the process runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.exit_status(), Ok(None))
    }

    /// Sends a signal by name (`TERM`, `STOP`, `HUP`, …); does nothing once the process has ended.
    pub fn signal(&mut self, name: &str) -> io::Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        // The shell's own `kill` is always there; /bin/kill isn't.
        let status = Command::new("sh")
            .args(["-c", "kill -s \"$1\" \"$0\""])
            .arg(self.id().to_string())
            .arg(name)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if status.success() || !self.is_running() {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "SIG{name} could not be sent to process {}",
                self.id()
            )))
        }
    }

    /// `kill -9`, and waits for the end of the process.
    pub fn kill9(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.exit_status()? {
            return Ok(status);
        }
        // The watcher goes first: it must never hold the id of a process that is no more.
        self.dismiss_watcher();
        self.process.kill()?;
        let status = self.process.wait()?;
        self.status = Some(status);
        Ok(status)
    }

    /// SIGTERM, then SIGKILL if the process is still there after `grace`.
    pub async fn terminate(&mut self, grace: Duration) -> io::Result<ExitStatus> {
        self.signal("TERM")?;
        match self.wait(grace).await? {
            Some(status) => Ok(status),
            None => self.kill9(),
        }
    }

    /// Waits up to `limit` for the process to end by itself; `None` if it still runs.
    pub async fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.exit_status()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn dismiss_watcher(&mut self) {
        if let Some(mut watcher) = self.watcher.take() {
            let _ = watcher.kill();
            let _ = watcher.wait();
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.kill9();
        self.dismiss_watcher();
    }
}

/// `exit code 1` or `signal 9`, for messages.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown end".into(),
    }
}

/// A loopback port that is ours: no other process that asks for one here gets it while this value
/// lives, be it listened on or not.
#[derive(Debug)]
pub struct Port {
    number: u16,
    /// A name that only one process can have; the system takes it back when that process is gone.
    #[cfg(target_os = "linux")]
    _claim: std::os::unix::net::UnixListener,
}

impl Port {
    /// The number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Claims that port; `AddrInUse` if somebody has it.
    pub fn claim(number: u16) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        let claim = {
            use std::os::linux::net::SocketAddrExt;
            use std::os::unix::net::{SocketAddr, UnixListener};
            let name = format!("sangam-port-{number}");
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?
        };
        Ok(Self {
            number,
            #[cfg(target_os = "linux")]
            _claim: claim,
        })
    }
}

/// A loopback port nobody listens on, from below the range that outgoing connections take, so that
/// it is still free when a server comes back to it.
pub fn free_port() -> io::Result<Port> {
    for _ in 0..200 {
        let Ok(port) = Port::claim(rand::random_range(20_000..32_000)) else {
            continue;
        };
        if std::net::TcpListener::bind(("127.0.0.1", port.number)).is_ok() {
            return Ok(port);
        }
    }
    Err(io::Error::other("no free loopback port"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_away_once_though_nobody_listens_on_it_yet() {
        let port = free_port().unwrap();
        let number = port.number();
        if cfg!(target_os = "linux") {
            let taken = Port::claim(number).unwrap_err();
            assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        }
        drop(port);
        Port::claim(number).unwrap();
    }
}
