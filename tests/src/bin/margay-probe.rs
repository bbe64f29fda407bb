//! The program of test pods: serves, or connects from its very first instruction.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use margay_tests::probe::knock::Knocker;
use margay_tests::probe::{Attempt, DENIED_AFTER, Protocol, Target, Verdict};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// Serves in a pod, or asks from it.
#[derive(Debug, Parser)]
enum Args {
    /// Sends back whatever comes.
    Serve {
        /// Ports of TCP.
        #[arg(long, value_delimiter = ',')]
        tcp: Vec<u16>,
        /// Ports of UDP.
        #[arg(long, value_delimiter = ',')]
        udp: Vec<u16>,
    },
    /// Asks every millisecond for a while, from its first instruction, and says how often it was answered.
    First {
        /// Whom, by TCP.
        target: SocketAddr,
        /// For how long.
        #[arg(long, default_value_t = 2000)]
        milliseconds: u64,
    },
    /// Asks once, by TCP.
    Connect {
        /// Whom.
        target: SocketAddr,
    },
}

fn main() -> Result<()> {
    match Args::parse() {
        Args::Serve { tcp, udp } => serve(&tcp, &udp),
        Args::First { target, milliseconds } => {
            first(target, Duration::from_millis(milliseconds));
            Ok(())
        }
        Args::Connect { target } => {
            println!("{target}: {:?}", once(target));
            Ok(())
        }
    }
}

fn serve(tcp: &[u16], udp: &[u16]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        for port in tcp {
            let listener = TcpListener::bind((any(), *port)).await?;
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(echo(stream));
                }
            });
        }
        for port in udp {
            let socket = UdpSocket::bind((any(), *port)).await?;
            tokio::spawn(async move {
                let mut buffer = vec![0; 2048];
                loop {
                    // An error here is about an earlier datagram, whose sender has gone.
                    if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                        let _ = socket.send_to(&buffer[..length], from).await;
                    }
                }
            });
        }
        let mut end = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        end.recv().await;
        Ok(())
    })
}

/// Every address of both IP versions, where the pod has both.
fn any() -> IpAddr {
    match std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)) {
        Ok(_) => Ipv6Addr::UNSPECIFIED.into(),
        Err(_) => Ipv4Addr::UNSPECIFIED.into(),
    }
}

async fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

fn first(target: SocketAddr, duration: Duration) {
    let begin = Instant::now();
    let target = Target { protocol: Protocol::Tcp, address: target };
    let mut knocker = Knocker::new(target, DENIED_AFTER);
    let (mut answered, mut other) = (0_u32, 0_u32);
    let mut first_answer = None;
    while begin.elapsed() < duration || !knocker.is_idle() {
        if begin.elapsed() < duration {
            knocker.knock();
        }
        for knocked in knocker.collect() {
            if knocked.verdict == Verdict::Answered {
                answered += 1;
                first_answer.get_or_insert(knocked.start.duration_since(begin).as_millis());
            } else {
                other += 1;
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let report = serde_json::json!({"answered": answered, "unanswered": other, "first_answer_ms": first_answer.map(|ms| ms as u64)});
    println!("{report}");
}

fn once(target: SocketAddr) -> Verdict {
    let attempt = Attempt::start(Target { protocol: Protocol::Tcp, address: target });
    loop {
        match attempt.look() {
            Some(verdict) => return verdict,
            None if attempt.start.elapsed() > DENIED_AFTER => return Verdict::Silent,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
