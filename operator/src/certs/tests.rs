use super::*;

const DAY: SignedDuration = SignedDuration::from_hours(24);

fn start() -> Timestamp {
    "2026-11-23T00:00:00Z".parse().unwrap()
}

fn authority() -> Authority {
    sign::advance(None, Step::Create, start()).unwrap()
}

#[test]
fn the_authority_moves_on_in_time() {
    let first = authority();
    let prepared = sign::advance(Some(&first), Step::Prepare, start() + DAY * 2500).unwrap();
    let promoted = sign::advance(Some(&prepared), Step::Promote, start() + DAY * 2501).unwrap();
    let table = [
        (None, 0, Step::Create),
        (Some(&first), 0, Step::Keep),
        (Some(&first), 2433, Step::Keep),
        (Some(&first), 2434, Step::Prepare),
        (Some(&first), 3650, Step::Create),
        (Some(&prepared), 2500, Step::Keep),
        (Some(&prepared), 2501, Step::Promote),
        (Some(&prepared), 3650, Step::Promote),
        (Some(&promoted), 2501, Step::Keep),
        (Some(&promoted), 3649, Step::Keep),
        (Some(&promoted), 3650, Step::Retire),
    ];
    for (authority, days, wanted) in table {
        assert_eq!(step(authority, start() + DAY * days), Ok(wanted), "day {days}");
    }
}

#[test]
fn every_certificate_in_use_is_trusted_through_a_rotation() {
    let first = authority();
    let old = &first.current.certificate;
    let prepared = sign::advance(Some(&first), Step::Prepare, start()).unwrap();
    let new = &prepared.next.as_ref().unwrap().certificate;
    let promoted = sign::advance(Some(&prepared), Step::Promote, start()).unwrap();
    let retired = sign::advance(Some(&promoted), Step::Retire, start()).unwrap();
    for (authority, signs, trusted) in [
        (&first, old, vec![old]),
        (&prepared, old, vec![old, new]),
        (&promoted, new, vec![new, old]),
        (&retired, new, vec![new]),
    ] {
        assert_eq!(&authority.current.certificate, signs);
        let count = authority.bundle().matches("BEGIN CERTIFICATE").count();
        assert_eq!(count, trusted.len());
        for pem in trusted {
            assert!(authority.bundle().contains(pem.trim_end()));
        }
    }
    assert_eq!(sign::advance(Some(&first), Step::Keep, start()).unwrap(), first);
}

#[test]
fn a_leaf_is_made_again_when_it_has_to_be() {
    let authority = authority();
    let other = sign::advance(None, Step::Create, start()).unwrap();
    let facts = Facts::parse(&authority.current.certificate).unwrap();
    let typha = sign::leaf(&authority, &TYPHA, start()).unwrap().certificate;
    let reader = sign::leaf(&authority, &READER, start()).unwrap().certificate;
    let foreign = sign::leaf(&other, &TYPHA, start()).unwrap().certificate;
    let table = [
        (None, 0, Some("there is none")),
        (Some("nonsense"), 0, Some("it cannot be read")),
        (Some(foreign.as_str()), 0, Some("another authority signed it")),
        (Some(reader.as_str()), 0, Some("it is for other names")),
        (Some(typha.as_str()), 0, None),
        (Some(typha.as_str()), 59, None),
        (Some(typha.as_str()), 61, Some("less than a third of its life is left")),
    ];
    for (stored, days, wanted) in table {
        assert_eq!(due(&TYPHA, stored, &facts, start() + DAY * days), wanted, "day {days}");
    }
}

#[test]
fn a_leaf_is_what_was_asked_for() {
    let authority = authority();
    let pair = sign::leaf(&authority, &TYPHA, start()).unwrap();
    let facts = Facts::parse(&pair.certificate).unwrap();
    assert_eq!(facts.common_name, "margay-typha");
    assert_eq!(facts.dns_names, ["margay-typha", "margay-typha.margay-system.svc"]);
    assert!(facts.not_before < start());
    assert_eq!(facts.not_after, start() + DAY * 90);
    assert!(pair.key.contains("PRIVATE KEY"));
    assert!(!format!("{pair:?}{authority:?}").contains("PRIVATE"));
    let reader = sign::leaf(&authority, &READER, start()).unwrap();
    let facts = Facts::parse(&reader.certificate).unwrap();
    assert_eq!((facts.common_name.as_str(), facts.organization.as_str()), ("margay:reader", "margay:readers"));
}

#[test]
fn no_leaf_outlives_its_authority() {
    let authority = authority();
    let end = Facts::parse(&authority.current.certificate).unwrap().not_after;
    let late = sign::leaf(&authority, &TYPHA, end - DAY).unwrap();
    assert_eq!(Facts::parse(&late.certificate).unwrap().not_after, end);
}

#[test]
fn serial_numbers_differ() {
    let authority = authority();
    let key = rcgen::KeyPair::generate().unwrap();
    let sign = |seconds| {
        let now = start() + SignedDuration::from_secs(seconds);
        let pem = sign::node(&authority, "n1", &key, DAY, now).unwrap();
        let (_, block) = parse_x509_pem(pem.as_bytes()).unwrap();
        block.parse_x509().unwrap().tbs_certificate.raw_serial_as_string()
    };
    assert_ne!(sign(0), sign(1));
}

#[test]
fn the_next_look_is_at_the_first_thing_that_can_be_due() {
    let authority = authority();
    let mut stored = Stored { authority: Some((authority.clone(), "1".to_owned())), ..Stored::default() };
    assert_eq!(next_look(&stored, start()), start() + DAY, "once a day without a reason");
    let leaf = sign::leaf(&authority, &TYPHA, start() - DAY * 60 + SignedDuration::from_hours(1));
    stored.typha = Some(leaf.unwrap().certificate);
    let look = next_look(&stored, start());
    assert!(look > start() && look <= start() + SignedDuration::from_hours(1), "{look}");
}
