//! How many shards operators want.

use super::*;

fn undo(world: &mut World, id: u64) -> u64 {
    let request = v1::ControlOperationRequest { id, control: OperationControl::Undo.into() };
    crate::cluster::elastic::control(&mut world.snapshot, &request, world.now_ms)
        .expect("it may be")
}

#[test]
fn what_operators_split_and_merge_is_asked_for_and_what_happens_by_itself_is_not() {
    let asked = |world: &World| world.snapshot.operations.shards_asked;
    let mut world = world();
    world.snapshot.operations.shards_asked = 2;
    let id = world.split();
    assert_eq!(asked(&world), 2, "not before it is done");
    world.run(id);
    assert_eq!(asked(&world), 3);
    let back = undo(&mut world, id);
    world.run(back);
    assert_eq!(asked(&world), 2);

    let work = SplitWork { shard: L, at: HALF / 2, automatic: true, ..SplitWork::default() };
    let id = begin_split(&mut world.snapshot, work, world.now_ms).expect("nothing is against it");
    world.run(id);
    assert_eq!(asked(&world), 2, "it grew by itself");
    let back = undo(&mut world, id);
    world.run(back);
    assert_eq!(asked(&world), 2, "and is as it was");

    let merge = begin_merge(&mut world.snapshot, (L, R), 0, world.now_ms);
    let merge = merge.expect("nothing is against it");
    by_itself(&mut world.snapshot, merge, true);
    world.run(merge);
    assert_eq!(asked(&world), 2, "it shrank by itself");
    world.snapshot.operations.shards_asked = 0;
    let id = world.split();
    world.run(id);
    assert_eq!(asked(&world), 0, "nobody knows");
}
