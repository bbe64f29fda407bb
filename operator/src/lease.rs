//! Which of several operators acts: the holder of the Lease `margay-operator`.

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

use crate::apply::bounded;

/// Name of the Lease.
const NAME: &str = "margay-operator";
/// How long a holder that is not heard of keeps the lease.
const DURATION: Duration = Duration::from_secs(15);
/// How often the holder is heard of, and others look.
const PERIOD: Duration = Duration::from_secs(4);
/// The longest that an attempt to renew may take: there is time for a second one before the term ends.
const ATTEMPT: Duration = Duration::from_secs(5);

/// What to do about a lease.
#[derive(Debug, PartialEq)]
enum Move {
    /// It is free, ours, or its holder has been silent for too long: write this.
    Write(LeaseSpec),
    /// Somebody else holds it.
    Wait,
}

/// Decides on the lease as found. Silence is measured by our own clock since `seen`, when this renewal was first seen: clocks of machines differ.
fn decide(found: Option<&LeaseSpec>, me: &str, now: Timestamp, silent: Duration) -> Move {
    let holder = found.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
    let theirs = !holder.is_empty() && holder != me;
    let term = found
        .and_then(|spec| spec.lease_duration_seconds)
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(DURATION, Duration::from_secs);
    if theirs && silent < term {
        return Move::Wait;
    }
    let mut spec = found.cloned().unwrap_or_default();
    if holder != me {
        spec.acquire_time = Some(MicroTime(now));
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
    }
    spec.holder_identity = Some(me.to_owned());
    spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
    spec.renew_time = Some(MicroTime(now));
    Move::Write(spec)
}

/// Until when we may act, by our own clock; none while we may not. Nobody else acts before: they count from when they see the renewal, we from
/// before it was written.
#[derive(Debug, Default)]
struct Term(Option<Instant>);

impl Term {
    /// When something that begins now and may take so long has to end: with the term, so that it is noticed that this is over.
    fn limit(&self, now: Instant, longest: Duration) -> Instant {
        self.0.map_or(now + longest, |end| end.min(now + longest))
    }

    /// An attempt that began then has held the lease, or found that somebody else does.
    fn settle(&mut self, began: Instant, held: bool) {
        self.0 = held.then(|| began + DURATION);
    }

    /// Whether we may act now.
    fn runs(&mut self, now: Instant) -> bool {
        self.0 = self.0.filter(|end| now < *end);
        self.0.is_some()
    }
}

/// Holds, or tries to hold, the lease until shutdown, when it is given up; tells `leading` about it.
pub async fn hold(client: Client, namespace: String, me: String, leading: watch::Sender<bool>, shutdown: Shutdown) {
    let api: Api<Lease> = Api::namespaced(client, &namespace);
    let mut seen: (Option<MicroTime>, Instant) = (None, Instant::now());
    let mut term = Term::default();
    loop {
        let began = Instant::now();
        match timeout_at(term.limit(began, ATTEMPT), attempt(&api, &me, &mut seen)).await {
            Ok(Ok(held)) => term.settle(began, held),
            Ok(Err(error)) => warn!(%error, "the lease cannot be read or written, trying again"),
            Err(_) => warn!("no answer about the lease in time, trying again"),
        }
        let now = Instant::now();
        set(&leading, term.runs(now));
        tokio::select! {
            () = shutdown.wait() => break,
            () = sleep_until(term.limit(now, PERIOD)) => {}
        }
        // Another operator may act as soon as our term is over.
        set(&leading, term.runs(Instant::now()));
    }
    if *leading.borrow() {
        set(&leading, false);
        if let Err(error) = bounded(release(&api, &me)).await {
            warn!(%error, "the lease was not given up; it ends by itself");
        }
    }
}

fn set(leading: &watch::Sender<bool>, held: bool) {
    let changed = leading.send_if_modified(|before| std::mem::replace(before, held) != held);
    if changed {
        info!(leading = held, "leadership changed");
    }
}

async fn attempt(api: &Api<Lease>, me: &str, seen: &mut (Option<MicroTime>, Instant)) -> Result<bool, Error> {
    let found = api.get_opt(NAME).await?;
    let spec = found.as_ref().and_then(|lease| lease.spec.as_ref());
    let renewal = spec.and_then(|spec| spec.renew_time.clone());
    if seen.0 != renewal {
        *seen = (renewal, Instant::now());
    }
    let Move::Write(spec) = decide(spec, me, Timestamp::now(), seen.1.elapsed()) else {
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
                metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
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

    fn written(decision: Move) -> (String, i32) {
        let Move::Write(spec) = decision else {
            panic!("the lease should be written");
        };
        (spec.holder_identity.unwrap_or_default(), spec.lease_transitions.unwrap_or_default())
    }

    #[test]
    fn a_lease_is_taken_when_it_is_free_or_silent() {
        let now = Timestamp::UNIX_EPOCH;
        let short = Duration::from_secs(14);
        let long = Duration::from_secs(15);
        assert_eq!(decide(Some(&held_by("b")), "a", now, short), Move::Wait);
        assert_eq!(written(decide(Some(&held_by("b")), "a", now, long)), ("a".to_owned(), 4));
        assert_eq!(written(decide(Some(&held_by("a")), "a", now, short)), ("a".to_owned(), 3));
        assert_eq!(written(decide(None, "a", now, short)), ("a".to_owned(), 1));
        assert_eq!(written(decide(Some(&held_by("")), "a", now, short)), ("a".to_owned(), 4));
    }

    /// One leads for its term and no longer, whatever attempts take and however they end; and goes on while they succeed.
    #[test]
    fn nobody_acts_beyond_the_term() {
        let start = Instant::now();
        // What attempts take in seconds, and whether they renew.
        for (answers, last_renewal) in [
            (&[(1, true), (60, false)][..], 0),
            (&[(5, true), (1, true), (0, false), (60, false)][..], 9),
            (&[(3, true), (4, false)][..], 0),
        ] {
            let mut term = Term::default();
            let (mut now, mut answers) = (start, answers.iter().chain(std::iter::repeat(&(0, false))));
            let stopped = loop {
                let (takes, renews) = *answers.next().expect("without end");
                let (began, limit, ends) = (now, term.limit(now, ATTEMPT), now + Duration::from_secs(takes));
                if renews && ends <= limit {
                    term.settle(began, true);
                }
                now = ends.min(limit);
                if !term.runs(now) {
                    break now;
                }
                now = term.limit(now, PERIOD);
                if !term.runs(now) {
                    break now;
                }
            };
            assert_eq!(stopped - start, Duration::from_secs(last_renewal) + DURATION);
        }
        let mut term = Term::default();
        term.settle(start, true);
        term.settle(start, false);
        assert!(!term.runs(start), "somebody else holds it");
    }
}
