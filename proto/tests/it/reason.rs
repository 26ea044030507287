//! Reasons: nothing of an error is lost on its way, and what is foreign is never taken for more
//! than it says.

use std::time::Duration;

use coracle_proto::limits::{self, FAULT_MESSAGE_BYTES_MAX, FAULT_METADATA_BYTES_MAX};
use coracle_proto::reason::{DOMAIN, Fault, Outcome, Reason, Retry, metadata};
use proptest::prelude::*;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

fn outcomes() -> [Outcome; 3] {
    [Outcome::NotApplied, Outcome::Applied, Outcome::Unknown]
}

#[test]
fn every_reason_survives_status_and_pipeline() {
    for &reason in Reason::ALL {
        assert_eq!(Reason::parse(reason.as_str()), Some(reason));
        for outcome in outcomes() {
            let fault = Fault::new(reason, "why, and the mend")
                .with_outcome(outcome)
                .with(metadata::SHARD, 7)
                .with(metadata::LEADER_ADDR, "127.0.0.1:7401")
                .with_retry_after(Duration::from_millis(1_234));
            let status = fault.to_status();
            assert_eq!(status.code(), reason.code());
            assert_eq!(Fault::from_status(&status), fault);
            let answer = fault.to_pipeline();
            assert_eq!(answer.code, reason.code() as i32);
            assert_eq!(Fault::from_pipeline(&answer), fault);
            assert_eq!(fault.number(metadata::SHARD), Some(7));
            assert_eq!(fault.number(metadata::LEADER_ADDR), None);
        }
    }
}

#[test]
fn names_are_unique_and_in_one_style() {
    let names: std::collections::BTreeSet<_> = Reason::ALL.iter().map(|r| r.as_str()).collect();
    assert_eq!(names.len(), Reason::ALL.len());
    for name in names {
        assert!(name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'), "{name}");
    }
    assert_eq!(Reason::parse("not_leader"), None);
}

#[test]
fn no_reason_invites_a_blind_retry_of_what_may_have_happened() {
    for &reason in Reason::ALL {
        assert_ne!(reason.code(), Code::Ok, "{reason}");
        assert_ne!(reason.outcome(), Outcome::Applied, "{reason}");
        let unknown = reason.outcome() == Outcome::Unknown;
        if reason.retry() != Retry::Never {
            assert_eq!(reason.retry() == Retry::SameRequestId, unknown, "{reason}");
        }
        let fault = Fault::new(reason, "").with_outcome(Outcome::Unknown);
        assert!(matches!(fault.retry(), Retry::Never | Retry::SameRequestId), "{reason}");
    }
}

/// Clients in other languages rely on it: what changes here changes for them.
#[test]
fn codes_and_meanings_as_published() {
    let table: Vec<String> = Reason::ALL
        .iter()
        .map(|r| format!("{r} {:?} {:?} {}", r.code(), r.retry(), r.outcome()))
        .collect();
    let expected = [
        "NOT_LEADER Unavailable Redirect not_applied",
        "STALE_ROUTE Unavailable RefreshRoute not_applied",
        "TOO_STALE Unavailable Redirect not_applied",
        "DRAINING Unavailable Redirect not_applied",
        "NO_QUORUM Unavailable BackOff not_applied",
        "OVERLOADED ResourceExhausted BackOff not_applied",
        "WRITE_STALLED ResourceExhausted BackOff not_applied",
        "CLOCK_OUT_OF_BOUND Unavailable BackOff not_applied",
        "OUTCOME_UNKNOWN DeadlineExceeded SameRequestId unknown",
        "UNREACHABLE Unavailable SameRequestId unknown",
        "RETRY_WINDOW_PASSED FailedPrecondition Never unknown",
        "DEADLINE_NOT_APPLIED DeadlineExceeded Never not_applied",
        "INVALID_ARGUMENT InvalidArgument Never not_applied",
        "TOO_LARGE InvalidArgument Never not_applied",
        "CROSS_ENTITY InvalidArgument Never not_applied",
        "UNKNOWN_KEYSPACE NotFound Never not_applied",
        "KEYSPACE_EXISTS AlreadyExists Never not_applied",
        "UNKNOWN_SHARD NotFound Never not_applied",
        "UNKNOWN_NODE NotFound Never not_applied",
        "VERSION_GONE OutOfRange Never not_applied",
        "CONFLICT Aborted Never not_applied",
        "NOT_ALLOWED PermissionDenied Never not_applied",
        "UNSUPPORTED Unimplemented Never not_applied",
        "NOT_INITIALIZED FailedPrecondition Never not_applied",
        "ALREADY_INITIALIZED AlreadyExists Never not_applied",
        "DISK_FULL ResourceExhausted Never not_applied",
        "CORRUPTION DataLoss Never unknown",
        "INTERNAL Internal Never unknown",
    ];
    assert_eq!(table, expected);
}

/// So do the names of the facts beside a reason.
#[test]
fn facts_go_by_the_names_as_published() {
    use metadata::*;
    let names = [
        OUTCOME,
        SHARD,
        EPOCH,
        MAP_EPOCH,
        LEADER_NODE,
        LEADER_ADDR,
        LEADER_TERM,
        NODE,
        KEYSPACE,
        LIMIT,
        MAX,
        GOT,
        FIELD,
        LAG_MS,
        OLDEST_VERSION,
        FLOOR,
        SERVER_TIME_MS,
        FILE,
        OFFSET,
        RECEIVED,
    ];
    let published = "outcome shard epoch map_epoch leader_node leader_addr leader_term node keyspace \
                     limit max got field lag_ms oldest_version floor server_time_ms file offset received";
    assert_eq!(names.join(" "), published);
}

#[test]
fn foreign_statuses_claim_nothing_about_a_write() {
    let cases = [
        (Status::unavailable("tcp connect error"), Reason::Unreachable, Outcome::Unknown),
        (Status::cancelled("Timeout expired"), Reason::OutcomeUnknown, Outcome::Unknown),
        (Status::deadline_exceeded(""), Reason::OutcomeUnknown, Outcome::Unknown),
        (Status::resource_exhausted(""), Reason::Overloaded, Outcome::Unknown),
        (Status::out_of_range("message too large"), Reason::InvalidArgument, Outcome::Unknown),
        (Status::unknown("h2"), Reason::Internal, Outcome::Unknown),
        (Status::not_found("proxy"), Reason::Internal, Outcome::Unknown),
        (Status::unimplemented(""), Reason::Unsupported, Outcome::NotApplied),
        (Status::unauthenticated(""), Reason::NotAllowed, Outcome::NotApplied),
    ];
    for (status, reason, outcome) in cases {
        let fault = Fault::from_status(&status);
        assert_eq!((fault.reason, fault.outcome), (reason, outcome), "{status}");
        assert!(fault.text(metadata::RECEIVED).is_some());
        assert_eq!(fault.message, status.message());
    }
    let other_domain = Status::with_error_details(
        Code::Unavailable,
        "",
        ErrorDetails::with_error_info(
            "NOT_LEADER",
            "other.example",
            [("outcome", "not_applied")].map(|(k, v)| (k.to_owned(), v.to_owned())),
        ),
    );
    let fault = Fault::from_status(&other_domain);
    assert_eq!((fault.reason, fault.outcome), (Reason::Unreachable, Outcome::Unknown));
    let garbage = Status::with_details(Code::Internal, "", vec![0xff; 40].into());
    assert_eq!(Fault::from_status(&garbage).reason, Reason::Internal);
}

/// A newer server's reason goes by its code, but its outcome and facts are understood.
#[test]
fn unknown_reasons_go_by_the_code() {
    let facts = [("outcome", "not_applied"), ("shard", "3")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let details = ErrorDetails::with_error_info("QUOTA", DOMAIN, facts.clone());
    let status = Status::with_error_details(Code::ResourceExhausted, "too many", details);
    let fault = Fault::from_status(&status);
    assert_eq!((fault.reason, fault.outcome), (Reason::Overloaded, Outcome::NotApplied));
    assert_eq!(fault.text(metadata::RECEIVED), Some("QUOTA"));
    assert_eq!(fault.number(metadata::SHARD), Some(3));

    let mut answer = Fault::new(Reason::NoQuorum, "").to_pipeline();
    answer.metadata.insert(metadata::OUTCOME.into(), "of a newer version".into());
    assert_eq!(Fault::from_pipeline(&answer).outcome, Outcome::Unknown);
    answer.metadata.clear();
    assert_eq!(Fault::from_pipeline(&answer).outcome, Outcome::NotApplied);
}

#[test]
fn limits_name_themselves() {
    let fault = Fault::from(limits::check_key(&[0; 5000]).unwrap_err());
    assert_eq!(fault.reason, Reason::TooLarge);
    assert_eq!(fault.text(metadata::LIMIT), Some("KEY_BYTES_MAX"));
    assert_eq!(
        (fault.number(metadata::MAX), fault.number(metadata::GOT)),
        (Some(4096), Some(5000))
    );
    let status = fault.to_status();
    assert_eq!(status.code(), Code::InvalidArgument);
    let violations = status.get_details_bad_request().expect("BadRequest").field_violations;
    assert_eq!((violations[0].field.as_str(), violations.len()), ("key", 1));

    assert_eq!(Fault::from(limits::check_key(b"").unwrap_err()).reason, Reason::InvalidArgument);
    let name = Fault::from(limits::check_keyspace_name("A").unwrap_err());
    assert_eq!(
        (name.reason, name.text(metadata::FIELD)),
        (Reason::InvalidArgument, Some("keyspace"))
    );
}

#[test]
fn errors_stay_small() {
    let fault = Fault::new(Reason::Corruption, "é".repeat(5_000))
        .with("a", "x".repeat(FAULT_METADATA_BYTES_MAX / 2))
        .with("b", "x".repeat(FAULT_METADATA_BYTES_MAX))
        .with("c", "last")
        .with(metadata::FIELD, "f".repeat(9_000));
    let status = fault.to_status();
    assert!(status.details().len() < 4_096, "{}", status.details().len());
    let read = Fault::from_status(&status);
    assert_eq!(read.message, "é".repeat(FAULT_MESSAGE_BYTES_MAX / 2));
    assert_eq!(read.outcome, Outcome::Unknown);
    assert_eq!(read.metadata.keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(Fault::from_pipeline(&fault.to_pipeline()), read);
}

#[test]
fn pauses_are_rounded_up() {
    let fault = Fault::new(Reason::Overloaded, "");
    assert_eq!(fault.clone().with_retry_after(Duration::from_micros(1)).retry_after_ms, 1);
    assert_eq!(fault.clone().with_retry_after(Duration::ZERO).retry_after_ms, 0);
    assert_eq!(fault.with_retry_after(Duration::MAX).retry_after_ms, u64::MAX);
}

proptest! {
    #[test]
    fn any_fault_survives(
        at in 0..Reason::ALL.len(),
        outcome in prop::sample::select(outcomes().to_vec()),
        message in ".{0,100}",
        facts in prop::collection::btree_map("[a-z_]{1,12}", ".{0,20}", 0..8),
        retry_after_ms in 0..1_000_000_u64,
    ) {
        let mut facts = facts;
        facts.remove(metadata::OUTCOME);
        let fault = Fault { reason: Reason::ALL[at], message, outcome, metadata: facts, retry_after_ms };
        prop_assert_eq!(&Fault::from_status(&fault.to_status()), &fault);
        prop_assert_eq!(&Fault::from_pipeline(&fault.to_pipeline()), &fault);
    }

    #[test]
    fn any_details_are_read_without_panic(code in 0..17, details: Vec<u8>) {
        let status = Status::with_details(Code::from_i32(code), "", details.into());
        let fault = Fault::from_status(&status);
        prop_assert!(fault.outcome != Outcome::Applied);
    }
}
