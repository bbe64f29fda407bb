use super::*;

const DAY: SignedDuration = SignedDuration::from_hours(24);

fn start() -> Timestamp {
    "2026-11-23T00:00:00Z".parse().unwrap()
}

fn authority() -> Authority {
    issue::advance(None, Step::Create, start()).unwrap()
}

#[test]
fn the_ca_is_rotated_in_time() {
    let first = authority();
    let prepared = issue::advance(Some(&first), Step::Prepare, start() + DAY * 2500).unwrap();
    let promoted = issue::advance(Some(&prepared), Step::Promote, start() + DAY * 2501).unwrap();
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
        assert_eq!(
            step(authority, start() + DAY * days),
            Ok(wanted),
            "day {days}"
        );
    }
}

#[test]
fn every_certificate_in_use_is_trusted_through_a_rotation() {
    let first = authority();
    let old = &first.current.certificate;
    let prepared = issue::advance(Some(&first), Step::Prepare, start()).unwrap();
    let new = &prepared.next.as_ref().unwrap().certificate;
    let promoted = issue::advance(Some(&prepared), Step::Promote, start()).unwrap();
    let retired = issue::advance(Some(&promoted), Step::Retire, start()).unwrap();
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
    assert_eq!(
        issue::advance(Some(&first), Step::Keep, start()).unwrap(),
        first
    );
}

#[test]
fn a_leaf_is_issued_again_when_it_is_due() {
    let authority = authority();
    let other = issue::advance(None, Step::Create, start()).unwrap();
    let facts = CertificateFacts::parse(&authority.current.certificate).unwrap();
    let typha = issue::leaf(&authority, &TYPHA, start())
        .unwrap()
        .certificate;
    let reader = issue::leaf(&authority, &READER, start())
        .unwrap()
        .certificate;
    let foreign = issue::leaf(&other, &TYPHA, start()).unwrap().certificate;
    let table = [
        (None, 0, Some("it is missing")),
        (Some("nonsense"), 0, Some("it cannot be read")),
        (
            Some(foreign.as_str()),
            0,
            Some("it was signed by another CA"),
        ),
        (Some(reader.as_str()), 0, Some("it is for other names")),
        (Some(typha.as_str()), 0, None),
        (Some(typha.as_str()), 59, None),
        (
            Some(typha.as_str()),
            61,
            Some("less than a third of its validity is left"),
        ),
    ];
    for (stored, days, wanted) in table {
        assert_eq!(
            due(&TYPHA, stored, &facts, start() + DAY * days),
            wanted,
            "day {days}"
        );
    }
}

#[test]
fn a_leaf_has_the_requested_names() {
    let authority = authority();
    let pair = issue::leaf(&authority, &TYPHA, start()).unwrap();
    let facts = CertificateFacts::parse(&pair.certificate).unwrap();
    assert_eq!(facts.common_name, "margay-typha");
    assert_eq!(
        facts.dns_names,
        ["margay-typha", "margay-typha.margay-system.svc"]
    );
    assert!(facts.not_before < start());
    assert_eq!(facts.not_after, start() + DAY * 90);
    assert!(pair.key.contains("PRIVATE KEY"));
    assert!(!format!("{pair:?}{authority:?}").contains("PRIVATE"));
    let reader = issue::leaf(&authority, &READER, start()).unwrap();
    let facts = CertificateFacts::parse(&reader.certificate).unwrap();
    assert_eq!(
        (facts.common_name.as_str(), facts.organization.as_str()),
        ("margay:reader", "margay:readers")
    );
}

#[test]
fn no_leaf_outlives_its_ca() {
    let authority = authority();
    let end = CertificateFacts::parse(&authority.current.certificate)
        .unwrap()
        .not_after;
    let late = issue::leaf(&authority, &TYPHA, end - DAY).unwrap();
    assert_eq!(
        CertificateFacts::parse(&late.certificate)
            .unwrap()
            .not_after,
        end
    );
}

#[test]
fn serial_numbers_differ() {
    let authority = authority();
    let key = rcgen::KeyPair::generate().unwrap();
    let sign = |seconds| {
        let now = start() + SignedDuration::from_secs(seconds);
        let pem = issue::node(&authority, "n1", &key, DAY, now).unwrap();
        let (_, block) = parse_x509_pem(pem.as_bytes()).unwrap();
        block
            .parse_x509()
            .unwrap()
            .tbs_certificate
            .raw_serial_as_string()
    };
    assert_ne!(sign(0), sign(1));
}

#[test]
fn the_next_check_is_when_the_first_step_can_be_due() {
    let authority = authority();
    let mut stored = Stored {
        authority: Some((authority.clone(), "1".to_owned())),
        ..Stored::default()
    };
    assert_eq!(
        next_check(&stored, start()),
        start() + DAY,
        "once a day without a reason"
    );
    let leaf = issue::leaf(
        &authority,
        &TYPHA,
        start() - DAY * 60 + SignedDuration::from_hours(1),
    );
    stored.typha = Some(leaf.unwrap().certificate);
    let look = next_check(&stored, start());
    assert!(
        look > start() && look <= start() + SignedDuration::from_hours(1),
        "{look}"
    );
}
