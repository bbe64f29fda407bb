//! Acknowledgements on their way to the server, at a bounded rate.

use std::sync::Arc;
use std::time::Duration;

use margay_proto::sync::{Ack, encode_ack, wire};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

/// Shortest time between two acknowledgements. The first one after a pause is sent at once; while
/// frames arrive all the time, one covers several, and a server of a thousand nodes reads a
/// fraction of the messages.
const PAUSE: Duration = Duration::from_millis(100);

/// Sends acknowledgements until the stream ends, each with the time for which it waited. The newest
/// replaces one that waits, also while the network is slow.
pub async fn send_acks(mut acks: watch::Receiver<Option<Arc<Ack>>>, up: mpsc::Sender<wire::Up>) {
    let mut free = Instant::now();
    while acks.changed().await.is_ok() {
        let mut since = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = sleep_until(free) => break,
                changed = acks.changed() => match changed {
                    Ok(()) => since = Instant::now(),
                    Err(_) => return,
                },
            }
        }
        let Some(ack) = acks.borrow_and_update().clone() else {
            continue;
        };
        free = Instant::now() + PAUSE;
        let waited_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        if up
            .send(encode_ack(&Ack {
                waited_us,
                ..Ack::clone(&ack)
            }))
            .await
            .is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use margay_proto::sync::decode_ack;

    use super::*;

    async fn received(up: &mut mpsc::Receiver<wire::Up>) -> Ack {
        match up.recv().await.and_then(|up| up.message) {
            Some(wire::up::Message::Ack(ack)) => decode_ack(ack).expect("an ack"),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_goes_at_once_and_the_newest_of_several_later() {
        let (publish, acks) = watch::channel(None);
        let (up, mut sent) = mpsc::channel(4);
        tokio::spawn(send_acks(acks, up));
        let start = Instant::now();
        let push = |revision| {
            publish.send_replace(Some(Arc::new(Ack {
                revision,
                ..Ack::default()
            })))
        };
        push(1);
        assert_eq!(
            (received(&mut sent).await.revision, start.elapsed()),
            (1, Duration::ZERO)
        );
        for revision in 2..=9 {
            push(revision);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let ack = received(&mut sent).await;
        assert_eq!((ack.revision, start.elapsed()), (9, PAUSE), "one for all");
        assert_eq!(ack.waited_us, 30_000, "since the newest was published");
        tokio::time::sleep(PAUSE).await;
        let before = Instant::now();
        push(10);
        assert_eq!(
            (received(&mut sent).await.revision, before.elapsed()),
            (10, Duration::ZERO),
            "after a pause"
        );
        drop(publish);
        assert!(sent.recv().await.is_none(), "it ends with the agent");
    }
}
