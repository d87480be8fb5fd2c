use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// An `OP_MSG` with the given ids whose body begins with `command`.
fn message(request_id: i32, response_to: i32, command: &str) -> Vec<u8> {
    let body = mongodb::bson::doc! { command: 1 }.to_vec().unwrap();
    let mut rest = vec![0, 0, 0, 0, 0];
    rest.extend_from_slice(&body);
    let mut bytes = Vec::new();
    for int in [16 + rest.len() as i32, request_id, response_to, 2013] {
        bytes.extend_from_slice(&int.to_le_bytes());
    }
    bytes.extend_from_slice(&rest);
    bytes
}

/// Wraps a message as a driver that compresses with zstd does.
fn compressed(message: &[u8]) -> Vec<u8> {
    let packed = zstd::encode_all(&message[16..], 3).unwrap();
    let mut bytes = Vec::new();
    let length = 16 + 9 + packed.len() as i32;
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&message[4..12]);
    bytes.extend_from_slice(&2012i32.to_le_bytes());
    bytes.extend_from_slice(&2013i32.to_le_bytes());
    bytes.extend_from_slice(&(message.len() as i32 - 16).to_le_bytes());
    bytes.push(3);
    bytes.extend_from_slice(&packed);
    bytes
}

/// A server that sends every byte back, and says when it has seen some.
async fn echo() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

async fn link_and_client() -> (FaultLink, TcpStream) {
    let link = FaultLink::open(echo().await).await.unwrap();
    let client = TcpStream::connect(link.address()).await.unwrap();
    (link, client)
}

async fn receive(client: &mut TcpStream, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    client.read_exact(&mut bytes).await.unwrap();
    bytes
}

#[tokio::test]
async fn passes_and_counts() {
    let (link, mut client) = link_and_client().await;
    let sent = [message(1, 0, "ping"), b"no such protocol ........".to_vec()].concat();
    client.write_all(&sent).await.unwrap();
    assert_eq!(receive(&mut client, sent.len()).await, sent);
    assert_eq!(link.bytes(Way::Up), sent.len() as u64);
    assert_eq!(link.bytes(Way::Down), sent.len() as u64);
    assert_eq!(link.connections(), 1);
}

#[tokio::test]
async fn cut_resets_and_refuses_and_heal_comes_back_on_the_same_port() {
    let (link, mut client) = link_and_client().await;
    client.write_all(&message(1, 0, "ping")).await.unwrap();
    receive(&mut client, 16).await;
    link.cut();
    let end = tokio::io::copy(&mut client, &mut tokio::io::sink()).await;
    assert!(end.is_err(), "a reset, not an orderly end: {end:?}");
    while TcpStream::connect(link.address()).await.is_ok() {
        tokio::task::yield_now().await;
    }
    link.heal();
    while TcpStream::connect(link.address()).await.is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn refuse_leaves_existing_connections() {
    let (link, mut client) = link_and_client().await;
    client.write_all(&message(1, 0, "ping")).await.unwrap();
    receive(&mut client, message(1, 0, "ping").len()).await;
    link.set(Mode::Refuse);
    while TcpStream::connect(link.address()).await.is_ok() {
        tokio::task::yield_now().await;
    }
    client.write_all(&message(2, 0, "ping")).await.unwrap();
    assert_eq!(receive(&mut client, 8).await[4], 2);
}

#[tokio::test]
async fn stall_holds_bytes_and_then_delivers_them() {
    let (link, mut client) = link_and_client().await;
    link.set(Mode::Stall);
    let sent = message(1, 0, "ping");
    client.write_all(&sent).await.unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(100), client.read(&mut byte)).await;
    assert!(early.is_err(), "nothing arrives while stalled");
    link.set(Mode::Pass);
    assert_eq!(receive(&mut client, sent.len()).await, sent);
}

#[tokio::test]
async fn delay_shifts_in_time_and_does_not_limit_throughput() {
    let (link, mut client) = link_and_client().await;
    link.round_trip(Duration::from_millis(100));
    let start = Instant::now();
    let sent: Vec<u8> = (0..2000).flat_map(|i| message(i, 0, "ping")).collect();
    client.write_all(&sent).await.unwrap();
    assert_eq!(receive(&mut client, sent.len()).await, sent);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(100), "{took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn throttle_limits_bytes_a_second() {
    let (link, mut client) = link_and_client().await;
    link.throttle(Way::Up, 20_000);
    let start = Instant::now();
    let sent: Vec<u8> = (0..200).flat_map(|i| message(i, 0, "ping")).collect();
    client.write_all(&sent).await.unwrap();
    receive(&mut client, sent.len()).await;
    let expected = sent.len() as f64 / 20_000.0;
    let took = start.elapsed().as_secs_f64();
    assert!((expected * 0.9..expected * 3.0).contains(&took), "{took} s");
}

#[tokio::test]
async fn a_chosen_reply_is_lost_and_others_pass() {
    for pack in [|m: &[u8]| m.to_vec(), compressed as fn(&[u8]) -> Vec<u8>] {
        // An upstream that answers each request with a reply to it.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = listener.local_addr().unwrap().to_string();
        let (seen, mut arrived) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            loop {
                let mut header = [0; 16];
                if stream.read_exact(&mut header).await.is_err() {
                    return;
                }
                let int = |at| i32::from_le_bytes(header[at..at + 4].try_into().unwrap());
                let mut rest = vec![0; int(0) as usize - 16];
                stream.read_exact(&mut rest).await.unwrap();
                let _ = seen.send(int(4));
                if stream.write_all(&message(100, int(4), "ok")).await.is_err() {
                    return;
                }
            }
        });
        let link = FaultLink::open(upstream).await.unwrap();
        let mut client = TcpStream::connect(link.address()).await.unwrap();
        link.lose_next_reply("update", AfterLoss::Reset);
        let reply = message(100, 1, "ok");

        client
            .write_all(&pack(&message(1, 0, "find")))
            .await
            .unwrap();
        assert_eq!(receive(&mut client, reply.len()).await, reply);
        client
            .write_all(&pack(&message(2, 0, "update")))
            .await
            .unwrap();
        let end = client.read(&mut [0]).await;

        assert!(!matches!(end, Ok(1)), "the reply is lost");
        assert_eq!(
            (arrived.recv().await, arrived.recv().await),
            (Some(1), Some(2))
        );
        link.wait_lost_replies(1).await;
        assert_eq!(link.lost_replies(), 1);
    }
}
