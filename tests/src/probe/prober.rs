//! Asks repeatedly from one network namespace, on a thread that stays there, and from a source port
//! that was not used recently: a tuple that was allowed once may still be tracked, and would pass
//! whatever the current policy is.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollTimeout, poll};

use super::{Attempt, Place, Target, Verdict};

/// Source ports that are used one after another: more than are used in the time that an entry is
/// tracked.
const PORTS: std::ops::Range<u16> = 10_000..64_000;

/// A thread in a pod's network that asks on request. It ends when this is dropped.
#[derive(Debug)]
pub struct Prober {
    questions: SyncSender<(Vec<Target>, Duration)>,
    answers: Receiver<Result<Vec<Verdict>>>,
}

impl Prober {
    /// Starts the thread.
    pub fn start(place: &Place) -> Result<Self> {
        let place = Place {
            file: place.handle()?,
        };
        let (questions, asked) = sync_channel::<(Vec<Target>, Duration)>(1);
        let (answer, answers) = sync_channel(1);
        thread::Builder::new()
            .name("prober".to_owned())
            .spawn(move || {
                place.run(move || {
                    let mut next = PORTS.start;
                    while let Ok((targets, patience)) = asked.recv() {
                        let attempts: Vec<Attempt> = targets
                            .iter()
                            .map(|target| from_fresh_port(*target, &mut next))
                            .collect();
                        if answer.send(verdicts(&attempts, patience)).is_err() {
                            return;
                        }
                    }
                })
            })?;
        Ok(Self { questions, answers })
    }

    /// Asks every target at once. Questions without an answer are denied when no answer has come
    /// for `patience`.
    pub fn ask(&self, targets: Vec<Target>, patience: Duration) -> Result<()> {
        self.questions
            .send((targets, patience))
            .ok()
            .context("the prober has ended")
    }

    /// The verdicts on what was asked, in the order of the targets.
    pub fn answers(&self) -> Result<Vec<Verdict>> {
        self.answers.recv().context("the prober has ended")?
    }
}

/// A port may be taken by something else in the pod: then the one after it.
fn from_fresh_port(target: Target, next: &mut u16) -> Attempt {
    const TRIES: u8 = 8;
    let mut attempt = None;
    for _ in 0..TRIES {
        let port = *next;
        *next = if port + 1 < PORTS.end {
            port + 1
        } else {
            PORTS.start
        };
        let begun = attempt.insert(Attempt::start_from(target, port));
        if begun.is_asked() {
            break;
        }
    }
    attempt.unwrap_or_else(|| Attempt::start(target))
}

/// Waits until every question is decided, or none was decided for `patience`: while there are
/// answers, others may only be late.
pub(super) fn verdicts(attempts: &[Attempt], patience: Duration) -> Result<Vec<Verdict>> {
    let mut last = attempts
        .iter()
        .map(|attempt| attempt.start)
        .max()
        .unwrap_or_else(Instant::now);
    let mut verdicts: Vec<Option<Verdict>> = vec![None; attempts.len()];
    loop {
        // An answer can be taken only once.
        for (verdict, attempt) in verdicts
            .iter_mut()
            .zip(attempts)
            .filter(|(verdict, _)| verdict.is_none())
        {
            *verdict = attempt.look();
            if verdict.is_some() {
                last = Instant::now();
            }
        }
        let left = (last + patience).saturating_duration_since(Instant::now());
        let open = attempts
            .iter()
            .zip(&verdicts)
            .filter(|(_, verdict)| verdict.is_none());
        let mut waiting: Vec<PollFd<'_>> = open
            .filter_map(|(attempt, _)| attempt.readiness())
            .map(|(file, events)| PollFd::new(file, events))
            .collect();
        if waiting.is_empty() || left.is_zero() {
            return Ok(verdicts
                .into_iter()
                .map(|verdict| verdict.unwrap_or(Verdict::Silent))
                .collect());
        }
        // Rounded up, or the last millisecond would be spent asking without a pause.
        let timeout =
            PollTimeout::try_from(left.as_millis() as i32 + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut waiting, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("questions cannot be waited for"),
        }
    }
}
