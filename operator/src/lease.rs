//! Leader election: of several operators only the holder of the Lease `margay-operator` acts.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, PostParams};
use kube::{Client, Error};
use margay_runtime::shutdown::Shutdown;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{info, warn};

use crate::client::bounded;

/// Name of the Lease.
const NAME: &str = "margay-operator";
/// Time after which a holder that does not renew loses the lease.
const DURATION: Duration = Duration::from_secs(15);
/// Interval of renewals, and of checks by others.
const PERIOD: Duration = Duration::from_secs(4);
/// Time limit of a renewal, so that there is time for a second attempt before the term ends.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Next step on a lease.
#[derive(Debug, PartialEq)]
enum LeaseStep {
    /// Write this spec: the lease is free, ours, or expired.
    Write(LeaseSpec),
    /// Wait: another operator holds it.
    Wait,
}

/// Decides on the lease as read. `silent` is measured by our own clock since this renewal was first
/// seen, because clocks of machines differ.
fn decide(found: Option<&LeaseSpec>, me: &str, now: Timestamp, silent: Duration) -> LeaseStep {
    let holder = found
        .and_then(|spec| spec.holder_identity.as_deref())
        .unwrap_or_default();
    let theirs = !holder.is_empty() && holder != me;
    let term = found
        .and_then(|spec| spec.lease_duration_seconds)
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(DURATION, Duration::from_secs);
    if theirs && silent < term {
        return LeaseStep::Wait;
    }
    let mut spec = found.cloned().unwrap_or_default();
    if holder != me {
        spec.acquire_time = Some(MicroTime(now));
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
    }
    spec.holder_identity = Some(me.to_owned());
    spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
    spec.renew_time = Some(MicroTime(now));
    LeaseStep::Write(spec)
}

/// End of our leadership by our own clock; none while we do not lead. No other operator leads
/// before: it counts from when it sees the renewal, and we count from before the renewal is
/// written.
#[derive(Debug, Default)]
struct Term(Option<Instant>);

impl Term {
    /// Returns the deadline of an action that begins now and may take `longest`: at most the end of
    /// the term, so that its end is noticed.
    fn limit(&self, now: Instant, longest: Duration) -> Instant {
        self.0.map_or(now + longest, |end| end.min(now + longest))
    }

    /// Records the result of an attempt that began at `began`: the lease is held, or another
    /// operator holds it.
    fn record(&mut self, began: Instant, held: bool) {
        self.0 = held.then(|| began + DURATION);
    }

    /// Returns true while we lead.
    fn check(&mut self, now: Instant) -> bool {
        self.0 = self.0.filter(|end| now < *end);
        self.0.is_some()
    }
}

/// Acquires and renews the lease until shutdown, then releases it; publishes leadership in
/// `leading`.
pub async fn hold(
    client: Client,
    namespace: String,
    me: String,
    leading: watch::Sender<bool>,
    shutdown: Shutdown,
) {
    let api: Api<Lease> = Api::namespaced(client, &namespace);
    let mut seen: (Option<MicroTime>, Instant) = (None, Instant::now());
    let mut term = Term::default();
    loop {
        let began = Instant::now();
        match timeout_at(term.limit(began, ATTEMPT), attempt(&api, &me, &mut seen)).await {
            Ok(Ok(held)) => term.record(began, held),
            Ok(Err(error)) => warn!(%error, "cannot read or write the lease, retrying"),
            Err(_) => warn!("timeout of a request for the lease, retrying"),
        }
        let now = Instant::now();
        set(&leading, term.check(now));
        tokio::select! {
            () = shutdown.wait() => break,
            () = sleep_until(term.limit(now, PERIOD)) => {}
        }
        // Another operator may act as soon as our term is over.
        set(&leading, term.check(Instant::now()));
    }
    if *leading.borrow() {
        set(&leading, false);
        if let Err(error) = bounded(release(&api, &me)).await {
            warn!(%error, "the lease was not released; it expires");
        }
    }
}

fn set(leading: &watch::Sender<bool>, held: bool) {
    let changed = leading.send_if_modified(|before| std::mem::replace(before, held) != held);
    if changed {
        info!(leading = held, "leadership changed");
    }
}

async fn attempt(
    api: &Api<Lease>,
    me: &str,
    seen: &mut (Option<MicroTime>, Instant),
) -> Result<bool, Error> {
    let found = api.get_opt(NAME).await?;
    let spec = found.as_ref().and_then(|lease| lease.spec.as_ref());
    let renewal = spec.and_then(|spec| spec.renew_time.clone());
    if seen.0 != renewal {
        *seen = (renewal, Instant::now());
    }
    let LeaseStep::Write(spec) = decide(spec, me, Timestamp::now(), seen.1.elapsed()) else {
        return Ok(false);
    };
    let params = PostParams::default();
    let written = match found {
        Some(mut lease) => {
            lease.spec = Some(spec);
            api.replace(NAME, &params, &lease).await
        }
        None => {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(NAME.to_owned()),
                    ..ObjectMeta::default()
                },
                spec: Some(spec),
            };
            api.create(&params, &lease).await
        }
    };
    match written {
        Ok(_) => Ok(true),
        Err(Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

async fn release(api: &Api<Lease>, me: &str) -> Result<(), Error> {
    let Some(mut lease) = api.get_opt(NAME).await? else {
        return Ok(());
    };
    let spec = lease.spec.get_or_insert_default();
    if spec.holder_identity.as_deref() == Some(me) {
        spec.holder_identity = None;
        api.replace(NAME, &PostParams::default(), &lease).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(who: &str) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(who.to_owned()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(3),
            ..LeaseSpec::default()
        }
    }

    fn written(decision: LeaseStep) -> (String, i32) {
        let LeaseStep::Write(spec) = decision else {
            panic!("must write the lease");
        };
        (
            spec.holder_identity.unwrap_or_default(),
            spec.lease_transitions.unwrap_or_default(),
        )
    }

    #[test]
    fn a_lease_is_acquired_when_it_is_free_or_expired() {
        let now = Timestamp::UNIX_EPOCH;
        let short = Duration::from_secs(14);
        let long = Duration::from_secs(15);
        assert_eq!(
            decide(Some(&held_by("b")), "a", now, short),
            LeaseStep::Wait
        );
        assert_eq!(
            written(decide(Some(&held_by("b")), "a", now, long)),
            ("a".to_owned(), 4)
        );
        assert_eq!(
            written(decide(Some(&held_by("a")), "a", now, short)),
            ("a".to_owned(), 3)
        );
        assert_eq!(written(decide(None, "a", now, short)), ("a".to_owned(), 1));
        assert_eq!(
            written(decide(Some(&held_by("")), "a", now, short)),
            ("a".to_owned(), 4)
        );
    }

    /// A leader leads for its term and no longer, whatever attempts take and however they end, and
    /// continues while they succeed.
    #[test]
    fn leadership_ends_with_the_term() {
        let start = Instant::now();
        // Durations of attempts in seconds, and whether they renew.
        for (answers, last_renewal) in [
            (&[(1, true), (60, false)][..], 0),
            (&[(5, true), (1, true), (0, false), (60, false)][..], 9),
            (&[(3, true), (4, false)][..], 0),
        ] {
            let mut term = Term::default();
            let (mut now, mut answers) =
                (start, answers.iter().chain(std::iter::repeat(&(0, false))));
            let stopped = loop {
                let (takes, renews) = *answers.next().expect("without end");
                let (began, limit, ends) = (
                    now,
                    term.limit(now, ATTEMPT),
                    now + Duration::from_secs(takes),
                );
                if renews && ends <= limit {
                    term.record(began, true);
                }
                now = ends.min(limit);
                if !term.check(now) {
                    break now;
                }
                now = term.limit(now, PERIOD);
                if !term.check(now) {
                    break now;
                }
            };
            assert_eq!(
                stopped - start,
                Duration::from_secs(last_renewal) + DURATION
            );
        }
        let mut term = Term::default();
        term.record(start, true);
        term.record(start, false);
        assert!(!term.check(start), "another operator holds it");
    }
}
