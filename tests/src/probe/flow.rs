//! A long connection with an echoed byte, which shows whether established traffic is ever
//! disturbed.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::Place;

/// Interval between bytes.
const BEAT: Duration = Duration::from_millis(20);

/// Report on a connection.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Bytes that were sent.
    pub sent: u64,
    /// Bytes that came back.
    pub echoed: u64,
    /// The longest time without an echo.
    pub longest_gap: Duration,
    /// Why the connection broke, if it did.
    pub broken: Option<String>,
}

/// A connection at work.
#[derive(Debug)]
pub struct Flow {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Report>,
}

impl Flow {
    /// Connects from `place` and begins to send.
    pub fn start(place: &Place, to: SocketAddrV4) -> Result<Self> {
        let stream = place
            .run(|| TcpStream::connect_timeout(&to.into(), Duration::from_secs(3)))?
            .with_context(|| format!("cannot connect to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let end = Arc::new(AtomicBool::new(false));
        let stop = end.clone();
        Ok(Self {
            end,
            thread: std::thread::spawn(move || run(stream, &stop)),
        })
    }

    /// Ends it.
    pub fn finish(self) -> Report {
        self.end.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn run(mut stream: TcpStream, end: &AtomicBool) -> Report {
    let mut report = Report::default();
    let mut last = Instant::now();
    let mut buffer = [0; 256];
    while !end.load(Ordering::Relaxed) && report.broken.is_none() {
        match stream.write(b"x") {
            Ok(_) => report.sent += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => (),
            Err(error) => report.broken = Some(error.to_string()),
        }
        std::thread::sleep(BEAT);
        match stream.read(&mut buffer) {
            Ok(0) => report.broken = Some("closed by the other side".to_owned()),
            Ok(length) => {
                report.echoed += length as u64;
                report.longest_gap = report.longest_gap.max(last.elapsed());
                last = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => (),
            Err(error) => report.broken = Some(error.to_string()),
        }
    }
    report.longest_gap = report.longest_gap.max(last.elapsed());
    report
}
