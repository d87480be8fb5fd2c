//! Moves the bytes of one connection: read and throttled, then delayed, held or lost, then written.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::wire::{self, HEADER, Header};
use super::{AfterLoss, Loss, Mode, Shared, Way, lock};

/// Most bytes on their way in one direction of a connection; at 100 ms that is 160 MB/s.
const IN_FLIGHT: usize = 16 << 20;

/// A piece of the stream with the moment it was read.
struct Piece {
    bytes: Vec<u8>,
    read_at: Instant,
    _room: OwnedSemaphorePermit,
}

/// Requests whose replies are to be lost, by request id.
type Doomed = Arc<Mutex<HashMap<i32, AfterLoss>>>;

/// Runs until either end closes, fails, or the generation is cancelled.
pub(super) async fn run(
    mut client: TcpStream,
    mut server: TcpStream,
    shared: Arc<Shared>,
    generation: CancellationToken,
) {
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    // Borrowed halves: owned ones would say an orderly goodbye before the reset.
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let doomed = Doomed::default();
    let up = half(Way::Up, from_client, to_server, &shared, doomed.clone());
    let down = half(Way::Down, from_server, to_client, &shared, doomed);
    tokio::select! {
        () = generation.cancelled() => {}
        _ = up => {}
        _ = down => {}
    }
}

async fn half(
    way: Way,
    from: ReadHalf<'_>,
    to: WriteHalf<'_>,
    shared: &Arc<Shared>,
    doomed: Doomed,
) -> io::Result<()> {
    let (send, receive) = mpsc::unbounded_channel();
    let reader = read(way, from, send, shared);
    let writer = write(way, to, receive, shared, doomed);
    tokio::try_join!(reader, writer).map(|_| ())
}

async fn read(
    way: Way,
    mut from: ReadHalf<'_>,
    send: mpsc::UnboundedSender<Piece>,
    shared: &Shared,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(IN_FLIGHT));
    let state = shared.way(way);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // Small pieces under a limit, so that it is even; the sender feels it through its socket.
        let rate = state.rate.load(Ordering::Relaxed);
        let most = if rate == 0 {
            buffer.len()
        } else {
            usize::try_from(rate / 20)
                .unwrap_or(usize::MAX)
                .clamp(16, buffer.len())
        };
        let n = from.read(&mut buffer[..most]).await?;
        if n == 0 {
            return Ok(());
        }
        if rate > 0 {
            let now = Instant::now();
            let wait = {
                let mut next = lock(&state.next);
                let start = next.map_or(now, |next| next.max(now));
                let end = start + Duration::from_secs_f64(n as f64 / rate as f64);
                *next = Some(end);
                end - now
            };
            tokio::time::sleep(wait).await;
        }
        let permits = u32::try_from(n).expect("a piece is at most 64 KiB");
        let Ok(room) = room.clone().acquire_many_owned(permits).await else {
            return Ok(());
        };
        let piece = Piece {
            bytes: buffer[..n].to_vec(),
            read_at: Instant::now(),
            _room: room,
        };
        if send.send(piece).is_err() {
            return Ok(());
        }
    }
}

async fn write(
    way: Way,
    mut to: WriteHalf<'_>,
    mut receive: mpsc::UnboundedReceiver<Piece>,
    shared: &Shared,
    doomed: Doomed,
) -> io::Result<()> {
    let mut mode = shared.mode.subscribe();
    let mut framing = Framing::new(way, doomed);
    let state = shared.way(way);
    while let Some(piece) = receive.recv().await {
        let delay = Duration::from_micros(state.delay_us.load(Ordering::Relaxed));
        tokio::time::sleep_until((piece.read_at + delay).into()).await;
        wait_while_stalled(&mut mode).await;
        if way == Way::Down && *mode.borrow() == Mode::LoseReplies {
            continue;
        }
        let armed = lock(&shared.loss).clone();
        let (bytes, lost) = framing.pass(&piece.bytes, armed.as_ref(), || {
            lock(&shared.loss).take().is_some()
        });
        state.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        to.write_all(&bytes).await?;
        if let Some(after) = lost {
            shared.after_loss(after);
            match after {
                AfterLoss::Silence => {}
                AfterLoss::Reset | AfterLoss::CutLink => {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
            }
        }
    }
    Ok(())
}

async fn wait_while_stalled(mode: &mut watch::Receiver<Mode>) {
    // Fails only when the link is gone, and this task with it.
    let _ = mode.wait_for(|mode| *mode != Mode::Stall).await;
}

/// Follows the borders of messages in one direction, to find requests and to leave replies out.
struct Framing {
    way: Way,
    doomed: Doomed,
    /// Bytes not yet passed because the beginning of their message isn't whole.
    held: Vec<u8>,
    /// Bytes left of the message that is passing, and whether it is thrown away.
    left: usize,
    losing: bool,
    /// The stream is something else (TLS): pass it as it is.
    opaque: bool,
}

impl Framing {
    fn new(way: Way, doomed: Doomed) -> Self {
        Self {
            way,
            doomed,
            held: vec![],
            left: 0,
            losing: false,
            opaque: false,
        }
    }

    /// What of `bytes` goes on now, and whether a reply ended here that was thrown away.
    fn pass(
        &mut self,
        bytes: &[u8],
        armed: Option<&Loss>,
        disarm: impl Fn() -> bool,
    ) -> (Vec<u8>, Option<AfterLoss>) {
        self.held.extend_from_slice(bytes);
        let mut out = Vec::with_capacity(self.held.len());
        let mut lost = None;
        loop {
            if self.opaque {
                out.append(&mut self.held);
                return (out, lost);
            }
            if self.left > 0 {
                let n = self.left.min(self.held.len());
                let passing = self.held.drain(..n);
                if !self.losing {
                    out.extend(passing);
                }
                self.left -= n;
                if self.left > 0 {
                    return (out, lost);
                }
                self.losing = false;
            }
            if self.held.len() < HEADER {
                return (out, lost);
            }
            let Some(header) = Header::read(&self.held) else {
                self.opaque = true;
                continue;
            };
            match self.way {
                Way::Up => {
                    if let Some(loss) = armed {
                        if self.held.len() < header.length.min(wire::HEAD) {
                            return (out, lost);
                        }
                        let command = wire::command_name(&self.held);
                        if command.as_deref() == Some(&loss.command) && disarm() {
                            lock(&self.doomed).insert(header.request_id, loss.after);
                        }
                    }
                }
                Way::Down => {
                    if let Some(after) = lock(&self.doomed).remove(&header.response_to) {
                        self.losing = true;
                        lost = Some(after);
                    }
                }
            }
            self.left = header.length;
        }
    }
}
