//! The program of test pods: serves, or connects from its very first instruction.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use margay_tests::probe::paced::PacedProber;
use margay_tests::probe::serve::Ports;
use margay_tests::probe::{Attempt, DENIED_AFTER, Protocol, Target, Verdict};

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
        /// Ports of SCTP, as far as an association's beginning.
        #[arg(long, value_delimiter = ',')]
        sctp: Vec<u16>,
    },
    /// Connects every millisecond for a while, from its first instruction on, and prints how often
    /// it was answered.
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
        Args::Serve { tcp, udp, sctp } => {
            let of =
                |protocol, ports: Vec<u16>| ports.into_iter().map(move |port| (protocol, port));
            let ports = of(Protocol::Tcp, tcp)
                .chain(of(Protocol::Udp, udp))
                .chain(of(Protocol::Sctp, sctp));
            serve(&ports.collect::<Vec<_>>())
        }
        Args::First {
            target,
            milliseconds,
        } => {
            first(target, Duration::from_millis(milliseconds));
            Ok(())
        }
        Args::Connect { target } => {
            println!("{target}: {:?}", once(target));
            Ok(())
        }
    }
}

fn serve(ports: &[(Protocol, u16)]) -> Result<()> {
    let ports = Ports::open(ports)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        ports.serve()?;
        let mut end = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        end.recv().await;
        Ok(())
    })
}

fn first(target: SocketAddr, duration: Duration) {
    let begin = Instant::now();
    let target = Target {
        protocol: Protocol::Tcp,
        address: target,
    };
    let mut prober = PacedProber::new(target, DENIED_AFTER);
    let (mut answered, mut other) = (0_u32, 0_u32);
    let mut first_answer = None;
    while begin.elapsed() < duration || !prober.is_idle() {
        if begin.elapsed() < duration {
            prober.probe();
        }
        for result in prober.collect() {
            if result.verdict == Verdict::Answered {
                answered += 1;
                first_answer.get_or_insert(result.start.duration_since(begin).as_millis());
            } else {
                other += 1;
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let report = serde_json::json!({
        "answered": answered,
        "unanswered": other,
        "first_answer_ms": first_answer.map(|ms| ms as u64),
    });
    println!("{report}");
}

fn once(target: SocketAddr) -> Verdict {
    let attempt = Attempt::start(Target {
        protocol: Protocol::Tcp,
        address: target,
    });
    loop {
        match attempt.look() {
            Some(verdict) => return verdict,
            None if attempt.start.elapsed() > DENIED_AFTER => return Verdict::Silent,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
