//! A link that can be made bad: a TCP proxy on loopback in front of one MongoDB server, for the
//! demo and the tests.
//!
//! What it does is switched at run time: pass, refuse, cut, stall, delay, throttle, and lose the
//! reply to a write that went through. The driver finds a replica set's members from the server's
//! `hello`, past any proxy; so clients take [`FaultLink::uri`], which says `directConnection=true`.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

mod pump;
mod wire;

/// What the link does with connections and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Everything goes through.
    Pass,
    /// Nobody listens: new connections are refused, existing ones live on.
    Refuse,
    /// The cable is pulled and the other end says so: existing connections are reset, new ones refused.
    Cut,
    /// Half-open: connections are accepted, bytes of both directions are held and go on with `Pass`.
    Stall,
    /// Requests go through, replies are thrown away. Leave it by `Cut`, for what follows a lost
    /// reply on the same connection makes no sense to the driver.
    LoseReplies,
}

/// What happens when the reply to a chosen request has been thrown away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterLoss {
    /// That connection is reset.
    Reset,
    /// The whole link is cut.
    CutLink,
    /// Nothing: the client waits until its own deadline.
    Silence,
}

/// Direction of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// A proxy in front of one server; it ends when this value is dropped.
#[derive(Debug)]
pub struct FaultLink {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
}

/// What the connections of a link share.
#[derive(Debug)]
struct Shared {
    upstream: String,
    mode: watch::Sender<Mode>,
    ways: [WayState; 2],
    /// Cancelled and replaced by each cut.
    generation: Mutex<CancellationToken>,
    loss: Mutex<Option<Loss>>,
    lost_replies: watch::Sender<u64>,
    connections: AtomicU64,
}

#[derive(Debug, Default)]
struct WayState {
    bytes: AtomicU64,
    delay_us: AtomicU64,
    /// Bytes a second; 0 is without limit.
    rate: AtomicU64,
    /// When the next byte may go under that limit.
    next: Mutex<Option<Instant>>,
}

/// An armed `lose_next_reply`.
#[derive(Clone, Debug)]
struct Loss {
    command: String,
    after: AfterLoss,
}

impl FaultLink {
    /// Opens a link to `upstream` (`host:port`) on a free loopback port.
    pub async fn open(upstream: impl Into<String>) -> io::Result<Self> {
        let upstream = upstream.into();
        // A program that knows nothing of claims may take the port between the two.
        for _ in 0..20 {
            let port = crate::process::free_port()?;
            match Self::open_on(port.number(), upstream.clone()).await {
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
                opened => return opened,
            }
        }
        Err(io::Error::other("no free loopback port"))
    }

    /// Opens a link on a given loopback port.
    pub async fn open_on(port: u16, upstream: impl Into<String>) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: upstream.into(),
            mode: watch::channel(Mode::Pass).0,
            ways: Default::default(),
            generation: Mutex::default(),
            loss: Mutex::default(),
            lost_replies: watch::channel(0).0,
            connections: AtomicU64::new(0),
        });
        let stop = CancellationToken::new();
        tokio::spawn(accept(listener, address, shared.clone(), stop.clone()));
        Ok(Self {
            address,
            shared,
            stop,
        })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// URI for clients without credentials.
    pub fn uri(&self) -> String {
        format!("mongodb://{}/?directConnection=true", self.address)
    }

    /// URI for clients that authenticate; name and password are taken as they are.
    pub fn uri_as(&self, user: &str, password: &str) -> String {
        let address = self.address;
        format!("mongodb://{user}:{password}@{address}/?directConnection=true&authSource=admin")
    }

    /// What the link does now.
    pub fn mode(&self) -> Mode {
        *self.shared.mode.borrow()
    }

    /// Switches what the link does; `Cut` ends every connection.
    pub fn set(&self, mode: Mode) {
        self.shared.set(mode);
    }

    /// `set(Mode::Cut)`.
    pub fn cut(&self) {
        self.set(Mode::Cut);
    }

    /// Back to `Mode::Pass`, without delay or limit, nothing armed.
    pub fn heal(&self) {
        for way in [Way::Up, Way::Down] {
            self.delay(way, Duration::ZERO);
            self.throttle(way, 0);
        }
        self.disarm();
        self.set(Mode::Pass);
    }

    /// Ends every connection once; new ones are accepted as the mode says.
    pub fn reset_connections(&self) {
        self.shared.reset();
    }

    /// Lets bytes of one direction arrive `delay` later; keeps their order, limits no rate.
    pub fn delay(&self, way: Way, delay: Duration) {
        let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.shared
            .way(way)
            .delay_us
            .store(micros, Ordering::Relaxed);
    }

    /// A round trip of `rtt`, half of it each way.
    pub fn round_trip(&self, rtt: Duration) {
        self.delay(Way::Up, rtt / 2);
        self.delay(Way::Down, rtt / 2);
    }

    /// Lets at most so many bytes a second through, of all connections together; 0 ends the limit.
    pub fn throttle(&self, way: Way, bytes_per_second: u64) {
        let state = self.shared.way(way);
        state.rate.store(bytes_per_second, Ordering::Relaxed);
        *lock(&state.next) = None;
    }

    /// Lets the next request with this command (`update`, `delete`, `commitTransaction`, …) through
    /// and throws its reply away. Sees through zstd compression, not through zlib or snappy.
    pub fn lose_next_reply(&self, command: &str, after: AfterLoss) {
        *lock(&self.shared.loss) = Some(Loss {
            command: command.into(),
            after,
        });
    }

    /// Undoes a `lose_next_reply` that has not matched yet.
    pub fn disarm(&self) {
        *lock(&self.shared.loss) = None;
    }

    /// How many replies `lose_next_reply` has thrown away so far.
    pub fn lost_replies(&self) -> u64 {
        *self.shared.lost_replies.borrow()
    }

    /// Waits until at least `count` replies have been thrown away.
    pub async fn wait_lost_replies(&self, count: u64) {
        let mut seen = self.shared.lost_replies.subscribe();
        // The sender lives as long as `self`.
        let _ = seen.wait_for(|lost| *lost >= count).await;
    }

    /// Bytes that went one way so far, as on the wire.
    pub fn bytes(&self, way: Way) -> u64 {
        self.shared.way(way).bytes.load(Ordering::Relaxed)
    }

    /// Connections opened so far.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

impl Drop for FaultLink {
    fn drop(&mut self) {
        self.stop.cancel();
        self.shared.reset();
    }
}

impl Shared {
    fn way(&self, way: Way) -> &WayState {
        &self.ways[way as usize]
    }

    fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
        if mode == Mode::Cut {
            self.reset();
        }
    }

    fn reset(&self) {
        std::mem::take(&mut *lock(&self.generation)).cancel();
    }

    fn generation(&self) -> CancellationToken {
        lock(&self.generation).clone()
    }

    fn after_loss(&self, after: AfterLoss) {
        self.lost_replies.send_modify(|count| *count += 1);
        if after == AfterLoss::CutLink {
            self.set(Mode::Cut);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .expect("no holder of a link's lock panics: they only copy values")
}

fn refuses(mode: Mode) -> bool {
    matches!(mode, Mode::Refuse | Mode::Cut)
}

/// Accepts connections while the mode allows it; otherwise the port is closed.
async fn accept(
    listener: TcpListener,
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
) {
    let mut mode = shared.mode.subscribe();
    let mut listener = Some(listener);
    loop {
        let now = *mode.borrow_and_update();
        if refuses(now) {
            listener = None;
        } else if listener.is_none() {
            listener = TcpListener::bind(address).await.ok();
        }
        tokio::select! {
            () = stop.cancelled() => return,
            // Cannot fail: `shared` holds the sender.
            _ = mode.changed() => {}
            accepted = next(listener.as_ref()), if !refuses(now) => {
                if let Some(client) = accepted {
                    shared.connections.fetch_add(1, Ordering::Relaxed);
                    let generation = shared.generation();
                    // A cut since `now` was read has not reached this connection's generation.
                    if !refuses(*shared.mode.borrow()) {
                        tokio::spawn(connection(client, shared.clone(), generation));
                    }
                }
            }
        }
    }
}

/// The next connection; without a listener, `None` after the moment to try to bind again.
async fn next(listener: Option<&TcpListener>) -> Option<TcpStream> {
    match listener {
        Some(listener) => Some(listener.accept().await.ok()?.0),
        None => {
            tokio::time::sleep(Duration::from_millis(20)).await;
            None
        }
    }
}

async fn connection(client: TcpStream, shared: Arc<Shared>, generation: CancellationToken) {
    let server = tokio::select! {
        () = generation.cancelled() => None,
        connected = TcpStream::connect(&shared.upstream) => connected.ok(),
    };
    // A reset, not an orderly end: that is what a broken line looks like.
    let _ = client.set_zero_linger();
    if let Some(server) = server {
        let _ = server.set_zero_linger();
        pump::run(client, server, shared, generation).await;
    }
}

#[cfg(test)]
mod tests;
