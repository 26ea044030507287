//! Which states may follow on which, and what becomes of operations that somebody controls.

use super::*;
use crate::cluster::testing;

const NOW_MS: u64 = 1_000;

fn records() -> Snapshot {
    testing::records([1].into_iter().map(testing::shard), 4)
}

fn set(snapshot: &mut Snapshot, state: NodeState, is_heard: bool) -> Result<(), Reason> {
    let request = v1::SetNodeStateRequest { node: 3, state: state.into() };
    set_node_state(snapshot, &request, is_heard).map_err(|(reason, _)| reason)
}

fn begun(snapshot: &mut Snapshot, kind: OperationKind, node: u64) -> u64 {
    let moves = vec![v1::PlannedMove { shard: 1, from_node: 3, to_node: 4, bytes: 1 }];
    let work = Work { kind, node, moves, ..Work::default() };
    operations::begin(snapshot, work, NOW_MS).expect("nothing stands against it")
}

fn controlled(snapshot: &mut Snapshot, id: u64, control: OperationControl) -> Result<u64, Reason> {
    let request = v1::ControlOperationRequest { id, control: control.into() };
    super::control(snapshot, &request, NOW_MS).map_err(|(reason, _)| reason)
}

#[test]
fn states_follow_on_each_other_and_what_is_gone_stays_gone() {
    use NodeState::{Active, Decommissioned, Decommissioning, Draining, Gone, Joining};
    let mut snapshot = records();
    let state = |snapshot: &Snapshot| snapshot.map.nodes[2].state();
    for wanted in [Draining, Active, Decommissioning, Draining, Decommissioning, Active] {
        assert_eq!(set(&mut snapshot, wanted, true), Ok(()));
        assert_eq!(state(&snapshot), wanted);
    }
    assert_eq!(set(&mut snapshot, Gone, true), Err(Reason::Conflict), "it answers");
    assert_eq!(set(&mut snapshot, Joining, true), Err(Reason::InvalidArgument));
    snapshot.map.nodes[2].state = Decommissioned.into();
    assert_eq!(set(&mut snapshot, Decommissioning, true), Ok(()));
    assert_eq!(state(&snapshot), Decommissioned, "it is empty already");
    assert_eq!(set(&mut snapshot, Gone, true), Ok(()), "it holds nothing: it may answer");
    for wanted in [Active, Draining, Decommissioning] {
        assert_eq!(set(&mut snapshot, wanted, true), Err(Reason::Conflict));
    }
    assert_eq!(set(&mut snapshot, Gone, false), Ok(()));
    let nobody = v1::SetNodeStateRequest { node: 9, state: Active.into() };
    let refused = set_node_state(&mut snapshot, &nobody, true).map_err(|(reason, _)| reason);
    assert_eq!(refused, Err(Reason::UnknownNode));
}

#[test]
fn one_that_stays_after_all_is_emptied_no_more() {
    for stays in [NodeState::Active, NodeState::Draining] {
        let mut snapshot = records();
        set(&mut snapshot, NodeState::Decommissioning, true).expect("it may");
        let id = begun(&mut snapshot, OperationKind::Decommission, 3);
        set(&mut snapshot, stays, true).expect("it may");
        assert!(snapshot.operations.find(id).expect("known").cancelling);
    }
    let mut snapshot = records();
    let id = begun(&mut snapshot, OperationKind::Move, 0);
    set(&mut snapshot, NodeState::Draining, true).expect("it may");
    assert!(!snapshot.operations.find(id).expect("known").cancelling, "another's affair");
}

#[test]
fn what_is_under_way_can_be_paused_resumed_and_cancelled_and_what_has_ended_undone() {
    use OperationControl::{Cancel, Pause, Resume, Undo};
    let mut snapshot = records();
    assert_eq!(controlled(&mut snapshot, 0, Pause), Err(Reason::Conflict), "nothing is there");
    let id = begun(&mut snapshot, OperationKind::Move, 0);
    let state = |snapshot: &Snapshot| snapshot.operations.find(id).expect("known").state();
    assert_eq!(controlled(&mut snapshot, 0, Pause), Ok(id), "the only one is meant");
    assert_eq!(state(&snapshot), OperationState::Paused);
    assert_eq!(controlled(&mut snapshot, id, Resume), Ok(id));
    assert_eq!(state(&snapshot), OperationState::Running);
    assert_eq!(controlled(&mut snapshot, id, Undo), Err(Reason::Conflict), "it is under way");
    assert_eq!(controlled(&mut snapshot, id + 1, Cancel), Err(Reason::Conflict), "no such");
    let unsaid = OperationControl::Unspecified;
    assert_eq!(controlled(&mut snapshot, id, unsaid), Err(Reason::InvalidArgument));
    controlled(&mut snapshot, id, Pause).expect("again");
    assert_eq!(controlled(&mut snapshot, id, Cancel), Ok(id));
    let known = snapshot.operations.find(id).expect("known");
    assert!(known.cancelling && known.state() == OperationState::Running, "it ends by itself");
    let known = snapshot.operations.list.iter_mut().find(|known| known.id == id).expect("known");
    known.state = OperationState::Done.into();
    for refused in [Pause, Resume, Cancel] {
        assert_eq!(controlled(&mut snapshot, id, refused), Err(Reason::Conflict), "{refused:?}");
    }
    assert_eq!(controlled(&mut snapshot, id, Undo), Err(Reason::Conflict), "it moved nothing");
    assert!(!snapshot.operations.manual);
    let known = snapshot.operations.list.iter_mut().find(|known| known.id == id).expect("known");
    known.moves[0].state = OperationState::Done.into();
    let back = v1::Replica { id: 20, node: 4, ..snapshot.map.shards[0].replicas[2] };
    snapshot.map.shards[0].replicas[2] = back;
    let undo = controlled(&mut snapshot, 0, Undo).expect("the last that ended");
    let undo = snapshot.operations.find(undo).expect("known");
    assert_eq!((undo.kind(), undo.undoes), (OperationKind::Undo, id));
    assert_eq!((undo.moves[0].from_node, undo.moves[0].to_node), (4, 3));
    assert!(snapshot.operations.manual, "else the balancer would do it all again");
}

#[test]
fn what_is_cancelled_does_not_begin_again_by_itself() {
    let mut snapshot = records();
    let id = begun(&mut snapshot, OperationKind::Balance, 0);
    controlled(&mut snapshot, id, OperationControl::Cancel).expect("it may");
    assert!(snapshot.operations.manual);
    let mut snapshot = records();
    set(&mut snapshot, NodeState::Decommissioning, true).expect("it may");
    let id = begun(&mut snapshot, OperationKind::Decommission, 3);
    controlled(&mut snapshot, id, OperationControl::Cancel).expect("it may");
    assert_eq!(snapshot.map.nodes[2].state(), NodeState::Active);
    assert!(!snapshot.operations.manual);
}
