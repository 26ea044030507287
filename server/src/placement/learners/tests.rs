//! Plans against exhaustive search, and against what must hold of any plan.

use coracle_storage::fs::faulty::Dice;

use super::*;

fn holders(zones: &[&str]) -> Vec<Holder> {
    let holder = |(n, zone): (usize, &&str)| Holder {
        node: NodeId(n as u64 + 1),
        zone: (*zone).to_owned(),
        takes: true,
    };
    zones.iter().enumerate().map(holder).collect()
}

fn placed(shard: u64, voters: &[u64], learners: &[(u64, u64)]) -> Placed {
    Placed {
        shard: ShardId(shard),
        voters: voters.iter().copied().map(NodeId).collect(),
        learners: learners.iter().map(|(id, node)| (ReplicaId(*id), NodeId(*node))).collect(),
        avoided: Vec::new(),
    }
}

fn rule(zone: &str, learners: u32) -> ReadReplicas {
    ReadReplicas { zone: zone.to_owned(), learners }
}

#[test]
fn learner_goes_where_the_zone_is_and_the_shard_is_not() {
    let nodes = holders(&["a", "b", "c", "a", "b"]);
    let shards = [placed(1, &[1, 2, 3], &[]), placed(2, &[4, 5, 3], &[])];
    let plan = plan(&nodes, &shards, &[rule("a", 1)]);
    assert_eq!(plan.add, [(ShardId(1), NodeId(4)), (ShardId(2), NodeId(1))]);
    assert_eq!((plan.remove.len(), plan.short.len()), (0, 0));
}

#[test]
fn nothing_new_comes_where_it_failed_and_what_is_there_stays() {
    let nodes = holders(&["a", "b", "c", "d", "d"]);
    let avoided = |learners: &[(u64, u64)]| Placed {
        avoided: vec![NodeId(4)],
        ..placed(1, &[1, 2, 3], learners)
    };
    let shards = [avoided(&[]), placed(2, &[1, 2, 3], &[(9, 5)])];
    assert_eq!(plan(&nodes, &shards, &[rule("d", 1)]).add, [(ShardId(1), NodeId(5))]);
    assert_eq!(plan(&nodes, &shards, &[rule("d", 2)]).short[0].shards, 1);
    assert_eq!(plan(&nodes, &[avoided(&[(9, 4)])], &[rule("d", 1)]), LearnerPlan::default());
}

#[test]
fn what_no_setting_wants_goes_and_what_one_wants_stays() {
    let nodes = holders(&["a", "b", "c", "a", "b"]);
    let shards = [placed(1, &[1, 2, 3], &[(8, 4), (9, 5)])];
    let kept = plan(&nodes, &shards, &[rule("a", 1), rule("b", 1)]);
    assert_eq!(kept, LearnerPlan::default());
    let fewer = plan(&nodes, &shards, &[rule("b", 1)]);
    assert_eq!(fewer.remove, [(ShardId(1), ReplicaId(8), NodeId(4))]);
    let none = plan(&nodes, &shards, &[rule("b", 0)]);
    assert_eq!(none.remove.len(), 2);
    // Without a zone both fit: they need not move.
    assert_eq!(plan(&nodes, &shards, &[rule("", 2)]), LearnerPlan::default());
}

#[test]
fn too_few_nodes_are_said() {
    let nodes = holders(&["a", "b", "c"]);
    let shards = [placed(1, &[1, 2, 3], &[]), placed(2, &[1, 2, 3], &[])];
    let plan = plan(&nodes, &shards, &[rule("c", 1), rule("x", 2)]);
    assert!(plan.add.is_empty());
    let told: Vec<String> = plan.short.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "zone c: 2 shards get fewer than 1 read replicas: the nodes there hold the shard already, or do not answer. Add nodes",
            "zone x: 2 shards get fewer than 2 read replicas: no node is there",
        ]
    );
}

#[test]
fn node_that_takes_none_keeps_what_it_has() {
    let mut nodes = holders(&["a", "a", "a", "a"]);
    nodes[3].takes = false;
    let shards = [placed(1, &[1, 2], &[(9, 4)]), placed(2, &[1, 2, 3], &[])];
    let plan = plan(&nodes, &shards, &[rule("a", 1)]);
    assert_eq!((plan.add, plan.remove), (vec![], vec![]));
    assert_eq!(plan.short[0].shards, 1);
}

struct World {
    nodes: Vec<Holder>,
    shards: Vec<Placed>,
    rules: Vec<ReadReplicas>,
}

fn world(dice: &mut Dice, nodes_max: u64, shards_max: u64) -> World {
    let zones = ["a", "b", "c"];
    let count = 1 + dice.below(nodes_max);
    let nodes = (1..=count).map(|node| Holder {
        node: NodeId(node),
        zone: zones[dice.below(3) as usize].to_owned(),
        takes: !dice.one_in(5),
    });
    let nodes: Vec<Holder> = nodes.collect();
    let mut next = 100;
    let shards = (1..=1 + dice.below(shards_max)).map(|shard| {
        let mut free: Vec<u64> = (1..=count).collect();
        let mut draw = |dice: &mut Dice, most: u64| -> Vec<u64> {
            let take = dice.below(most + 1).min(free.len() as u64);
            (0..take).map(|_| free.remove(dice.below(free.len() as u64) as usize)).collect()
        };
        let (voters, on) = (draw(dice, 3), draw(dice, 2));
        let learners: Vec<(u64, u64)> = on
            .into_iter()
            .map(|node| {
                next += 1;
                (next, node)
            })
            .collect();
        placed(shard, &voters, &learners)
    });
    let shards = shards.collect();
    let mut rules = vec![rule("a", dice.below(3) as u32), rule("c", dice.below(2) as u32)];
    rules.push(rule("", dice.below(2) as u32));
    World { nodes, shards, rules }
}

/// The world after a plan was carried out.
fn carried_out(world: &World, plan: &LearnerPlan) -> Vec<Placed> {
    let mut shards = world.shards.clone();
    for (at, shard) in shards.iter_mut().enumerate() {
        shard
            .learners
            .retain(|(replica, node)| !plan.remove.contains(&(shard.shard, *replica, *node)));
        let add = plan.add.iter().filter(|(id, _)| *id == shard.shard).zip(1..);
        let add = add.map(|((_, node), n)| (ReplicaId(10_000 + 10 * at as u64 + n), *node));
        shard.learners.extend(add.collect::<Vec<_>>());
    }
    shards
}

fn loads(world: &World, shards: &[Placed]) -> Vec<u64> {
    let on = |node: NodeId| {
        shards.iter().flat_map(|shard| &shard.learners).filter(|(_, on)| *on == node).count()
    };
    world.nodes.iter().map(|holder| on(holder.node) as u64).collect()
}

#[test]
fn any_plan_is_sound_and_carried_out_leaves_nothing_to_do() {
    for seed in 0..10_000 {
        let world = world(&mut Dice::new(seed), 9, 12);
        let made = plan(&world.nodes, &world.shards, &world.rules);
        let after = carried_out(&world, &made);
        let zone = |node: NodeId| {
            world.nodes.iter().find(|holder| holder.node == node).map(|holder| &holder.zone)
        };
        for shard in &after {
            let nodes = shard.voters.iter().chain(shard.learners.iter().map(|(_, node)| node));
            let nodes: Vec<NodeId> = nodes.copied().collect();
            let distinct: BTreeSet<NodeId> = nodes.iter().copied().collect();
            assert_eq!(nodes.len(), distinct.len(), "seed {seed}: two replicas on a node");
            let mut over = 0;
            for rule in world.rules.iter().filter(|rule| !rule.zone.is_empty()) {
                let there = shard.learners.iter().filter(|(_, on)| zone(*on) == Some(&rule.zone));
                let there = there.count() as u32;
                let short = made.short.iter().any(|short| short.rule == *rule);
                assert!(there >= rule.learners || short, "seed {seed}: {rule:?}, {shard:?}");
                over += there.saturating_sub(rule.learners);
            }
            let any = world.rules.iter().find(|rule| rule.zone.is_empty()).expect("there is one");
            let elsewhere = shard
                .learners
                .iter()
                .filter(|(_, on)| !world.rules.iter().any(|rule| zone(*on) == Some(&rule.zone)));
            over += elsewhere.count() as u32;
            assert!(over <= any.learners, "seed {seed}: more than anybody asked for: {shard:?}");
        }
        for (shard, node) in &made.add {
            let holder = world.nodes.iter().find(|holder| holder.node == *node);
            assert!(holder.is_some_and(|holder| holder.takes), "seed {seed}: {shard} on {node}");
        }
        let again = plan(&world.nodes, &after, &world.rules);
        assert_eq!((again.add, again.remove), (vec![], vec![]), "seed {seed}");
    }
}

/// The least sum of squares of loads that any choice for the new learners has.
fn least(world: &World, made: &LearnerPlan, at: usize, shards: &mut [Placed]) -> u64 {
    let Some((id, _)) = made.add.get(at) else {
        return loads(world, shards).iter().map(|load| load * load).sum();
    };
    let place = shards.iter().position(|shard| shard.shard == *id).expect("it is there");
    let mut best = u64::MAX;
    for holder in world.nodes.iter().filter(|holder| holder.takes && holder.zone == "a") {
        let shard = &shards[place];
        let held = shard.voters.contains(&holder.node)
            || shard.learners.iter().any(|(_, on)| *on == holder.node);
        if !held {
            shards[place].learners.push((ReplicaId(9_999), holder.node));
            best = best.min(least(world, made, at + 1, shards));
            shards[place].learners.pop();
        }
    }
    best
}

#[test]
fn new_learners_are_as_even_as_exhaustive_search_makes_them() {
    for seed in 0..2_000 {
        let mut world = world(&mut Dice::new(seed), 5, 5);
        world.rules = vec![rule("a", 1)];
        let made = plan(&world.nodes, &world.shards, &world.rules);
        let after = carried_out(&world, &made);
        let even: u64 = loads(&world, &after).iter().map(|load| load * load).sum();
        let nothing_new = LearnerPlan { add: Vec::new(), ..made.clone() };
        let mut kept = carried_out(&world, &nothing_new);
        assert_eq!(even, least(&world, &made, 0, &mut kept), "seed {seed}: {:?}", made.add);
    }
}
