//! The end of a process: one signal asks every part to finish, a second one or a deadline forces
//! it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info};

/// Exit status when parts did not finish in time.
const FORCED: i32 = 1;

/// Shutdown request shared by every part of a process; cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown(Arc<watch::Sender<bool>>);

impl Default for Shutdown {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

/// A part that did not finish within the deadline given to [`Shutdown::drain`].
#[derive(Debug, thiserror::Error)]
#[error("{what} did not finish within {deadline:?} of the shutdown; it was cut off")]
pub struct Unfinished {
    /// The part, as named by the caller.
    pub what: &'static str,
    /// The deadline that it missed.
    pub deadline: Duration,
}

impl Shutdown {
    /// Triggered by SIGTERM or SIGINT. If the process still lives `deadline` after that, or when a
    /// second signal comes, it exits with status 1. Needs a tokio runtime.
    pub fn on_signals(deadline: Duration) -> io::Result<Self> {
        let shutdown = Self::default();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let trigger = shutdown.clone();
        tokio::spawn(async move {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                () = trigger.wait() => "the process itself",
            };
            info!(signal = name, ?deadline, "shutting down");
            trigger.trigger();
            let why = tokio::select! {
                _ = terminate.recv() => "a second signal came",
                _ = interrupt.recv() => "a second signal came",
                () = tokio::time::sleep(deadline) => "the deadline is over",
            };
            error!(why, ?deadline, "exiting before every part has finished");
            std::process::exit(FORCED);
        });
        Ok(shutdown)
    }

    /// Asks every part to finish; more than once is the same as once.
    pub fn trigger(&self) {
        self.0
            .send_if_modified(|asked| !std::mem::replace(asked, true));
    }

    /// Returns true once every part has been asked to finish.
    pub fn is_triggered(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until the parts are asked to finish; returns at once if they already were.
    pub async fn wait(&self) {
        let mut asked = self.0.subscribe();
        // The sender is `self`, so the channel cannot close meanwhile.
        let _ = asked.wait_for(|asked| *asked).await;
    }

    /// Runs `part` to its end, but not longer than `deadline` after the shutdown request.
    pub async fn drain<T>(
        &self,
        what: &'static str,
        deadline: Duration,
        part: impl Future<Output = T>,
    ) -> Result<T, Unfinished> {
        tokio::select! {
            done = part => Ok(done),
            () = async { self.wait().await; tokio::time::sleep(deadline).await } => {
                Err(Unfinished { what, deadline })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_waiter_is_woken_also_a_later_one() {
        let shutdown = Shutdown::default();
        let early = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.wait().await }
        });
        assert!(!shutdown.is_triggered());
        shutdown.trigger();
        shutdown.trigger();
        early.await.expect("early waiter");
        shutdown.clone().wait().await;
        assert!(shutdown.is_triggered());
    }

    #[tokio::test]
    async fn a_part_has_until_the_deadline_after_the_request() {
        let shutdown = Shutdown::default();
        let deadline = Duration::from_millis(20);
        let mut stuck =
            std::pin::pin!(shutdown.drain("sessions", deadline, std::future::pending::<()>()));
        let unasked = tokio::time::timeout(2 * deadline, &mut stuck).await;
        assert!(unasked.is_err(), "without a request there is no deadline");
        shutdown.trigger();
        let error = stuck.await.expect_err("a part that never ends");
        assert_eq!(
            error.to_string(),
            "sessions did not finish within 20ms of the shutdown; it was cut off"
        );
        let quick = shutdown.drain("sessions", deadline, async { 7 });
        assert_eq!(quick.await.expect("a part that ends"), 7);
    }
}
