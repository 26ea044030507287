//! The searching judge is held against one that tries every order, on small histories of all kinds;
//! against long ones that are right by construction; and its counterexamples against being small.

use std::collections::BTreeSet;

use coracle_jepsen::checker::{search, shrink};
use coracle_jepsen::history::{Action, Answer, History, Operation, Outcome, Position, Seen};
use coracle_jepsen::timeline;
use coracle_storage::fs::faulty::Dice;

const KEY: &str = "k";

fn seen(value: u64) -> Option<Seen> {
    (value > 0).then(|| Seen { value: value.to_string(), version: value })
}

fn read(value: u64) -> Outcome {
    Outcome::Ok(Answer::Read { seen: seen(value), at: Position::default() })
}

fn refused(value: u64) -> Outcome {
    Outcome::Ok(Answer::Mismatch { seen: seen(value), at: Position::default() })
}

/// A write's version is its value: names, nothing more.
fn written(value: u64) -> Outcome {
    Outcome::Ok(Answer::Written { version: value, at: Position::default() })
}

fn operation(
    call: u64,
    action: Action,
    (begin, end): (usize, usize),
    outcome: Outcome,
) -> Operation {
    let client = call as u32;
    let end = if matches!(outcome, Outcome::Unknown) { usize::MAX } else { end };
    let (begin_us, end_us) = (begin as u64, end as u64);
    Operation { call, client, key: KEY.to_owned(), action, begin, end, begin_us, end_us, outcome }
}

/// What an operation makes of a value, and whether its answer fits. By the rules of a register, said
/// once more and in another way.
fn perform(one: &Operation, value: u64) -> Option<u64> {
    let own = one.action.value().and_then(|value| value.parse().ok());
    let holds = match one.action {
        Action::PutIfAbsent { .. } => value == 0,
        Action::PutIfVersion { version, .. } => value == version,
        _ => true,
    };
    let after = match (own, one.action.is_delete()) {
        (Some(own), _) if holds => own,
        (_, true) => 0,
        _ => value,
    };
    let fits = match &one.outcome {
        Outcome::Ok(Answer::Read { seen: told, .. }) => *told == seen(value),
        Outcome::Ok(Answer::Mismatch { seen: told, .. }) => !holds && *told == seen(value),
        Outcome::Ok(Answer::Written { .. }) => holds,
        Outcome::Unknown => true,
        Outcome::Fail => false,
    };
    fits.then_some(after)
}

/// Whether some order explains all, by trying every one.
fn explained(left: &[&Operation], value: u64) -> bool {
    let open = |one: &&Operation| one.outcome == Outcome::Unknown;
    if left.iter().all(open) {
        return true;
    }
    (0..left.len()).any(|at| {
        let one = left[at];
        let others: Vec<&Operation> = left
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != at)
            .map(|(_, one)| *one)
            .collect();
        // Nothing may stand before what had ended when it began.
        let may_be_next = others.iter().all(|other| other.end > one.begin);
        may_be_next && perform(one, value).is_some_and(|value| explained(&others, value))
    })
}

fn draw(dice: &mut Dice) -> Vec<Operation> {
    let count = 2 + dice.below(5) as usize;
    // Begins and ends in a random order.
    let mut places: Vec<usize> = (0..2 * count).collect();
    for at in (1..places.len()).rev() {
        places.swap(at, dice.below(at as u64 + 1) as usize);
    }
    let mut all = Vec::new();
    for call in 0..count {
        let (first, second) = (places[2 * call], places[2 * call + 1]);
        let own = call as u64 + 1;
        let other = dice.below(count as u64 + 1);
        let put = || own.to_string();
        let (action, mut outcome) = match dice.below(8) {
            0..=2 => (Action::Get, read(other)),
            3 => (Action::Put { value: put() }, written(own)),
            4 => (Action::PutIfAbsent { value: put() }, written(own)),
            5 => (Action::PutIfVersion { value: put(), version: other.max(1) }, written(own)),
            6 => (Action::Delete, written(own + 100)),
            _ => (Action::PutIfAbsent { value: put() }, refused(other)),
        };
        if dice.below(4) == 0 {
            outcome = Outcome::Unknown;
        } else if dice.below(12) == 0 {
            outcome = Outcome::Fail;
        }
        all.push(operation(call as u64, action, (first.min(second), first.max(second)), outcome));
    }
    all.sort_by_key(|one| one.begin);
    all
}

/// A condition on a version that nobody was told says less than the model takes it to say.
fn names_what_was_told(all: &[Operation]) -> bool {
    let told: BTreeSet<u64> = all
        .iter()
        .flat_map(|one| match &one.outcome {
            Outcome::Ok(Answer::Written { version, .. }) => Some(*version),
            Outcome::Ok(Answer::Read { seen, .. } | Answer::Mismatch { seen, .. }) => {
                seen.as_ref().map(|seen| seen.version)
            }
            _ => None,
        })
        .collect();
    all.iter().all(|one| match one.action {
        Action::PutIfVersion { version, .. } => told.contains(&version),
        _ => true,
    })
}

#[test]
fn it_agrees_with_trying_every_order() {
    let (mut good, mut bad) = (0, 0);
    for seed in 0..60_000 {
        let all = draw(&mut Dice::new(seed));
        if !names_what_was_told(&all) {
            continue;
        }
        let left: Vec<&Operation> = all.iter().filter(|one| one.outcome != Outcome::Fail).collect();
        let expected = explained(&left, 0);
        let found = search::check_key(KEY.to_owned(), &all);
        assert_eq!(found.is_none(), expected, "seed {seed}: {found:?} in {all:#?}");
        if expected {
            good += 1;
        } else {
            bad += 1;
        }
    }
    assert!(good > 1_000 && bad > 1_000, "{good} good, {bad} bad");
}

/// A history that a register made: clients with one operation at a time, each of which takes effect
/// somewhere between its begin and its end. Some outcomes are lost.
fn made(seed: u64, count: u64, clients: usize) -> Vec<Operation> {
    let mut dice = Dice::new(seed);
    let (mut value, mut place) = (0, 0);
    let mut all: Vec<Operation> = Vec::new();
    // Of each client: its operation, and whether it took effect.
    let mut open: Vec<Option<(Operation, bool)>> = vec![None; clients];
    while all.len() < count as usize {
        let client = dice.below(clients as u64) as usize;
        place += 1;
        match open[client].take() {
            None => {
                let call = place as u64;
                let put = call.to_string();
                let action = match dice.below(6) {
                    0 | 1 => Action::Get,
                    2 => Action::Put { value: put },
                    3 => Action::PutIfAbsent { value: put },
                    4 => Action::PutIfVersion { value: put, version: value.max(1) },
                    _ => Action::Delete,
                };
                let mut one = operation(call, action, (place, usize::MAX), Outcome::Unknown);
                one.client = client as u32;
                open[client] = Some((one, false));
            }
            Some((mut one, false)) => {
                let holds = match one.action {
                    Action::PutIfAbsent { .. } => value == 0,
                    Action::PutIfVersion { version, .. } => value == version,
                    _ => true,
                };
                one.outcome = match one.action {
                    Action::Get => read(value),
                    _ if holds => written(one.call),
                    _ => refused(value),
                };
                value = perform(&one, value).expect("told as it was");
                open[client] = Some((one, true));
            }
            Some((mut one, true)) => {
                one.end = place;
                if dice.below(50) == 0 {
                    (one.outcome, one.end) = (Outcome::Unknown, usize::MAX);
                }
                all.push(one);
            }
        }
    }
    // Those that are still under way may have taken effect.
    for (mut one, _) in open.into_iter().flatten() {
        one.outcome = Outcome::Unknown;
        all.push(one);
    }
    all.sort_by_key(|one| one.begin);
    all
}

#[test]
fn what_a_register_did_is_explained_and_one_wrong_answer_is_found_and_made_small() {
    let mut found = 0;
    for seed in 0..40 {
        let all = made(seed, 400, 5);
        assert_eq!(search::check_key(KEY.to_owned(), &all), None, "seed {seed}");
        // A read that is told what stood long before.
        let mut dice = Dice::new(seed + 1_000);
        let mut wrong = all.clone();
        let reads: Vec<usize> = (200..wrong.len())
            .filter(|at| {
                matches!(wrong[*at].outcome, Outcome::Ok(Answer::Read { seen: Some(_), .. }))
            })
            .collect();
        let at = reads[dice.below(reads.len() as u64) as usize];
        let old = wrong[..100].iter().find_map(|one| match &one.outcome {
            Outcome::Ok(Answer::Written { version, .. }) if one.action.value().is_some() => {
                Some(*version)
            }
            _ => None,
        });
        wrong[at].outcome = read(old.expect("somebody wrote"));
        let Some(unexplained) = search::check_key(KEY.to_owned(), &wrong) else { continue };
        found += 1;
        let small = shrink::shrink(&wrong);
        let again = search::check_key(KEY.to_owned(), &small).expect("it is still wrong");
        assert!(small.len() <= 4, "seed {seed}: {} of {}", small.len(), wrong.len());
        assert!(unexplained.call.is_some() && again.call.is_some());
        let page = timeline::page("k", "why", &small, again.call);
        assert_eq!(page.matches("class=culprit").count(), 1, "{page}");
        assert_eq!(page.matches("<rect").count(), small.len());
    }
    assert_eq!(found, 40, "a value that was overwritten long before is never right");
}

/// As many operations as a long run has, in the time that a person waits; printed, as no other machine
/// is like this one.
#[test]
fn a_long_history_is_walked_once() {
    let began = std::time::Instant::now();
    let (mut operations, mut keys) = (0, 0);
    while operations < 100_000 {
        let all = made(10_000 + keys, 10_000, 5);
        assert_eq!(search::check_key(KEY.to_owned(), &all), None, "seed {keys}");
        (operations, keys) = (operations + all.len(), keys + 1);
    }
    println!(
        "{operations} operations on {keys} keys: {:?}, drawing them included",
        began.elapsed()
    );
}

#[test]
fn too_many_open_operations_are_no_pass() {
    let mut all: Vec<Operation> = (0..70)
        .map(|call| {
            operation(
                call,
                Action::Put { value: call.to_string() },
                (call as usize, 1_000),
                written(call),
            )
        })
        .collect();
    all.push(operation(99, Action::Get, (2_000, 2_001), read(5)));
    let found = search::check_key(KEY.to_owned(), &all).expect("no pass");
    assert_eq!(found.call, None);
    assert_eq!(search::check(&History::default()), []);
}
