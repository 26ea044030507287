//! What an operator would see: a node more, a node less, a lost one, zones, full disks, hot shards.

use std::time::Duration;

use super::super::model::{Disk, Goal, Plan, Spread, Stall, Why};
use super::worlds::{node, shard, view};
use super::*;

fn settings(replicas: usize) -> Settings {
    Settings { replicas, ..Settings::default() }
}

/// A balanced cluster of equal nodes.
fn cluster(zones: &[&str], shards: u64, replicas: usize) -> View {
    let nodes = zones.iter().zip(1..).map(|(zone, id)| node(id, zone)).collect();
    let empty = view(nodes, (0..shards).map(|id| shard(id, &[])).collect());
    let placed = plan(&empty, &settings(replicas));
    let mut made = empty.after(&placed);
    for shard in &mut made.shards {
        shard.leader = placed.wanted[&shard.id].leader;
    }
    made
}

fn checked(view: &View, settings: &Settings) -> Plan {
    let made = plan(view, settings);
    check(view, settings, &made).expect("a sound plan");
    assert!(plan(&view.after(&made), settings).is_empty());
    made
}

#[test]
fn node_more_takes_its_share_and_nothing_else_moves() {
    for (zones, shards) in [(3, 16), (3, 17), (4, 48), (5, 16), (7, 64), (9, 100)] {
        let mut grown = cluster(&vec!["z"; zones], shards, 3);
        grown.nodes.push(node(99, "z"));
        let made = checked(&grown, &settings(3));
        let all = 3 * shards as usize;
        assert!(made.copies() <= all.div_ceil(zones + 1), "{} of {all}", made.copies());
        assert_eq!(made.copies(), made.lower_bound);
        assert!(made.moves().all(|change| change.to == Some(NodeId(99))));
        assert!(made.moves().all(|change| change.why == Why::Balance));
    }
}

#[test]
fn plan_says_its_bytes_time_and_spread() {
    let mut grown = cluster(&["z"; 3], 16, 3);
    grown.nodes.push(node(4, "z"));
    let settings = Settings {
        bytes_per_second: 1 << 20,
        moves_at_a_time: 4,
        move_overhead: Duration::from_secs(2),
        ..settings(3)
    };
    let made = checked(&grown, &settings);
    assert_eq!((made.copies(), made.bytes), (12, 12 << 20));
    // Three rounds of four, three seconds each.
    assert_eq!(made.estimate, Duration::from_secs(9));
    assert_eq!(made.epoch, Epoch(42));
    let spread = |replicas, leaders| Spread { replicas, bytes: replicas, leaders, load: 1_000 };
    assert_eq!(made.before, spread(1_333, 1_500));
    assert_eq!(made.after, spread(1_000, 1_000));
}

#[test]
fn node_that_leaves_is_emptied_and_its_leaders_are_handed_over() {
    let mut view = cluster(&["z"; 4], 16, 3);
    view.nodes[0].duty = Duty::Leaves;
    let held = view.shards.iter().filter(|shard| shard.voters.iter().any(|seat| seat.node.0 == 1));
    let held = held.count();
    for goal in [Goal::Repair, Goal::Balance] {
        let made = checked(&view, &Settings { goal, ..settings(3) });
        assert_eq!((made.copies(), made.lower_bound), (held, held));
        assert!(made.moves().all(|change| change.why == Why::Leaving));
        assert!(made.wanted.values().all(|placed| !placed.voters.contains(&NodeId(1))));
        assert!(made.moves().any(|change| change.hand_over.is_some()));
        assert_eq!(made.stalls, []);
    }
}

#[test]
fn node_that_restarts_loses_its_leaders_and_nothing_else() {
    for duty in [Duty::Keeps, Duty::Absent] {
        let mut view = cluster(&["a", "b", "c", "d", "e"], 20, 3);
        view.nodes[2].duty = duty;
        let made = checked(&view, &settings(3));
        assert_eq!(made.copies(), 0);
        let leads = made.wanted.values().any(|placed| placed.leader == Some(NodeId(3)));
        assert!(!leads);
        // From one that is silent there is nothing to transfer.
        assert_eq!(made.transfers().any(|t| t.from == NodeId(3)), duty == Duty::Keeps);
    }
}

#[test]
fn lost_replicas_are_made_first_and_dead_quorums_are_told() {
    let mut view = cluster(&["z"; 5], 10, 3);
    view.nodes.truncate(4);
    view.nodes.push(node(6, "z"));
    view.shards.push(shard(10, &[1, 5, 7]));
    let made = checked(&view, &settings(3));
    assert_eq!(made.stalls, [Stall::QuorumLost { shard: ShardId(10) }]);
    let whys: Vec<Why> = made.moves().map(|change| change.why).collect();
    assert!(whys.is_sorted(), "{whys:?}");
    assert!(whys.contains(&Why::Lacking));
    let text = made.stalls[0].to_string();
    assert!(text.starts_with("shard 10 has lost its quorum"), "{text}");
}

#[test]
fn zone_more_is_used_by_every_shard() {
    let mut view = cluster(&["a", "a", "b", "b"], 16, 3);
    view.nodes.push(node(5, "c"));
    let made = checked(&view, &settings(3));
    assert_eq!((made.copies(), made.lower_bound), (16, 16));
    assert!(made.moves().all(|change| change.why == Why::Zones && change.to == Some(NodeId(5))));
}

#[test]
fn weights_are_shares() {
    let mut view = cluster(&["z"; 4], 40, 2);
    view.nodes[3].weight = 2 * WEIGHT_ONE;
    let made = checked(&view, &settings(2));
    let held =
        |id: u64| made.wanted.values().filter(|placed| placed.voters.contains(&NodeId(id))).count();
    assert_eq!([held(1), held(2), held(3), held(4)], [16, 16, 16, 32]);
    assert_eq!((made.copies(), made.lower_bound), (12, 12));
}

#[test]
fn too_few_nodes_are_told_and_nobody_loses_a_replica() {
    let mut view = cluster(&["a", "b", "c"], 4, 3);
    view.nodes[0].duty = Duty::Leaves;
    let made = checked(&view, &settings(3));
    assert_eq!(made.copies(), 0);
    let few = Stall::TooFewNodes { wanted: 3, possible: 2, shards: 4 };
    assert_eq!(made.stalls, [few, Stall::NotEmptied { node: NodeId(1), replicas: 4 }]);
    assert_eq!(
        made.stalls[0].to_string(),
        "4 shards get fewer than 3 replicas: only 2 nodes may hold them. Add nodes"
    );
    view.nodes.push(node(4, "a"));
    let made = checked(&view, &settings(3));
    assert_eq!((made.copies(), made.stalls), (4, vec![]));
}

#[test]
fn full_disk_takes_nothing_and_says_so() {
    let mut view = cluster(&["z"; 4], 8, 3);
    view.nodes[3].duty = Duty::Leaves;
    let room = |used: u64| Some(Disk { capacity: 100 << 20, used: used << 20 });
    view.nodes.iter_mut().for_each(|node| node.disk = room(84));
    let made = checked(&view, &settings(3));
    // Each of the three others has room for one.
    assert_eq!(made.copies(), 3);
    let full = made.stalls.iter().find_map(|stall| match stall {
        Stall::DisksFull { shards, fill_max: 850, nodes } => Some((*shards, nodes.clone())),
        _ => None,
    });
    let full = full.expect("it is told");
    assert_eq!(full.0, 3);
    assert_eq!(full.1[0].1, 840);
    let text = made.stalls[0].to_string();
    assert!(text.contains("the disk of n1 is 84 % full"), "{text}");
    view.nodes[0].disk = room(10);
    let made = checked(&view, &settings(3));
    assert!(made.moves().all(|change| view.node(change.to.unwrap()).is_some()), "{made:?}");
}

#[test]
fn replicas_setting_that_falls_or_rises_is_followed() {
    let view = cluster(&["a", "b", "c", "d"], 8, 3);
    let fewer = checked(&view, &settings(1));
    assert_eq!((fewer.copies(), fewer.steps.len()), (0, 16));
    let more = checked(&view, &settings(4));
    assert_eq!((more.copies(), more.lower_bound, more.steps.len()), (8, 8, 8));
    assert!(more.moves().all(|change| change.from.is_none() && change.why == Why::Lacking));
}

#[test]
fn leaders_go_where_they_are_preferred_and_evenly() {
    let view = cluster(&["a", "a", "b", "b", "c", "c"], 24, 3);
    let settings = Settings { leader_zones: vec!["b".to_owned()], ..settings(3) };
    let made = plan_leaders(&view, &settings);
    check(&view, &settings, &made).expect("a sound plan");
    let led =
        |id: u64| made.wanted.values().filter(|placed| placed.leader == Some(NodeId(id))).count();
    assert_eq!((led(3), led(4), made.copies()), (12, 12, 0));
}

#[test]
fn hot_shards_are_led_apart_and_loads_that_waver_move_nothing() {
    // Four hot ones on as many nodes, all but one led by n3.
    let voters = |id: u64| [id % 4 + 1, (id + 1) % 4 + 1, (id + 2) % 4 + 1];
    let mut view = view(
        (1..=4).map(|id| node(id, "z")).collect(),
        (0..16).map(|id| shard(id, &voters(id))).collect(),
    );
    for (at, shard) in view.shards.iter_mut().enumerate() {
        let third = shard.voters.iter().any(|seat| seat.node.0 == 3);
        shard.leader = if third { Some(NodeId(3)) } else { shard.leader };
        shard.load = if at < 4 { 1_000 } else { 50 };
    }
    let made = checked(&view, &settings(3));
    assert!(made.before.load > 2_500 && made.after.load < 1_200, "{:?}", made.after);
    assert_eq!(made.copies(), 0);
    let mut after = view.after(&made);
    for (at, shard) in after.shards.iter_mut().enumerate() {
        shard.load = shard.load * (98 + at as u64 % 5) / 100;
    }
    assert!(plan(&after, &settings(3)).is_empty(), "5 % is not worth a transfer");
}

#[test]
fn bytes_far_from_even_are_swapped_and_those_nearly_even_are_not() {
    let mut view = cluster(&["z"; 4], 16, 1);
    for shard in &mut view.shards {
        shard.bytes = if shard.leader == Some(NodeId(1)) { 40 << 30 } else { 10 << 30 };
    }
    let made = checked(&view, &settings(1));
    assert!(made.for_bytes > 0 && made.lower_bound == 0);
    assert!(made.before.bytes > 2_000 && made.after.bytes <= 1_200, "{:?}", made.after);
    for shard in &mut view.shards {
        shard.bytes = if shard.leader == Some(NodeId(1)) { 11 << 30 } else { 10 << 30 };
    }
    assert!(plan(&view, &settings(1)).is_empty());
}

#[test]
fn replicas_of_hot_shards_are_spread_where_bytes_stay_even() {
    // The hot ones are all on the first three of six nodes.
    let on = |id: u64| if id.is_multiple_of(2) { [1, 2, 3] } else { [4, 5, 6] };
    let mut view = view(
        (1..=6).map(|id| node(id, "z")).collect(),
        (0..16).map(|id| shard(id, &on(id))).collect(),
    );
    for (at, shard) in view.shards.iter_mut().enumerate() {
        shard.load = if at % 2 == 0 { 1_000 } else { 10 };
    }
    let load = |view: &View, id: u64| -> u64 {
        let here = |shard: &&ShardView| shard.voters.iter().any(|seat| seat.node.0 == id);
        view.shards.iter().filter(here).map(|shard| shard.load).sum()
    };
    let most = |view: &View| (1..=6).map(|id| load(view, id)).max();
    let made = checked(&view, &settings(3));
    let after = view.after(&made);
    assert!(made.for_bytes > 0 && made.lower_bound == 0);
    assert!(most(&view) == Some(8_000) && most(&after) < Some(7_000), "{:?}", most(&after));
    assert!(plan(&after, &settings(3)).is_empty());
    // Not where bytes would be uneven then.
    for (at, shard) in view.shards.iter_mut().enumerate() {
        shard.bytes = if at % 2 == 0 { 10 << 30 } else { 30 << 30 };
    }
    let made = checked(&view, &settings(3));
    assert!(made.after.bytes <= 1_200, "{:?}", made.after);
    for shard in &mut view.shards {
        shard.load = 0;
    }
    assert!(!plan(&view, &settings(3)).is_empty(), "bytes alone would move some");
}

#[test]
fn a_plan_that_is_cut_tells_what_comes_of_what_is_left() {
    let mut view = cluster(&["a", "b", "c", "a", "b"], 16, 3);
    view.nodes.push(node(6, "c"));
    view.shards.iter_mut().for_each(|shard| shard.bytes = 1 << 30);
    let whole = checked(&view, &settings(3));
    assert!(whole.moves().count() > 3 && whole.bytes == (whole.copies() as u64) << 30);
    let three = cut(&view, &whole, &settings(3), 3);
    assert_eq!((three.moves().count(), three.bytes, three.lower_bound), (3, 3 << 30, 3));
    assert!(three.estimate < whole.estimate && three.estimate > std::time::Duration::ZERO);
    let after = view.after(&three);
    for shard in &after.shards {
        let mut voters: Vec<NodeId> = shard.voters.iter().map(|seat| seat.node).collect();
        voters.sort_unstable();
        let placed = &three.wanted[&shard.id];
        assert_eq!((&voters, shard.leader), (&placed.voters, placed.leader), "as it will be");
        assert!(placed.leader.is_some_and(|leader| voters.contains(&leader)));
    }
    let held = after.shards.iter().flat_map(|shard| &shard.voters);
    assert_eq!(held.filter(|seat| seat.node.0 == 6).count(), 3);
    assert_eq!(cut(&view, &whole, &settings(3), 99), whole);
}

#[test]
fn plan_is_undone_by_a_plan_towards_what_was() {
    let mut view = cluster(&["a", "b", "c", "a", "b"], 16, 3);
    view.nodes.push(node(6, "c"));
    let made = checked(&view, &settings(3));
    assert!(made.copies() > 0);
    let before: std::collections::BTreeMap<_, _> = view
        .shards
        .iter()
        .map(|shard| {
            let voters = shard.voters.iter().map(|seat| seat.node).collect();
            (shard.id, super::super::model::Placed { voters, leader: shard.leader })
        })
        .collect();
    let after = view.after(&made);
    let undone = after.after(&plan_towards(&after, &before, &settings(3)));
    for (was, is) in view.shards.iter().zip(&undone.shards) {
        let nodes = |shard: &ShardView| {
            let mut nodes: Vec<NodeId> = shard.voters.iter().map(|seat| seat.node).collect();
            nodes.sort_unstable();
            nodes
        };
        assert_eq!((nodes(was), was.leader), (nodes(is), is.leader));
    }
}

#[test]
fn first_placement_spreads_replicas_and_leaders() {
    let candidate =
        |(zone, id): (&&str, u64)| Candidate { node: NodeId(id), zone: (*zone).to_owned() };
    let candidates: Vec<Candidate> =
        ["a", "b", "c", "a", "b"].iter().zip(1..).map(candidate).collect();
    let placed = place(&candidates, 17, 3);
    let count = |of: &dyn Fn(&Vec<NodeId>, NodeId) -> bool, id| {
        placed.iter().filter(|voters| of(voters, NodeId(id))).count()
    };
    for voters in &placed {
        let zones: std::collections::BTreeSet<&str> =
            voters.iter().map(|node| candidates[node.0 as usize - 1].zone.as_str()).collect();
        assert_eq!((voters.len(), zones.len()), (3, 3));
    }
    // c has one node, so that it holds them all.
    let held: Vec<usize> =
        (1..=5).map(|id| count(&|voters, id| voters.contains(&id), id)).collect();
    assert!(held[2] == 17 && held.iter().all(|held| [8, 9, 17].contains(held)), "{held:?}");
    let led: Vec<usize> = (1..=5).map(|id| count(&|voters, id| voters[0] == id, id)).collect();
    assert!(led.iter().all(|led| [3, 4].contains(led)), "{led:?}");
    assert!(place(&candidates[..2], 4, 3).iter().all(|voters| voters.len() == 2));
    assert!(place(&candidates[..1], 4, 3).iter().all(|voters| voters.len() == 1));
}

#[test]
fn hundred_nodes_and_ten_thousand_shards_are_planned_for() {
    let zones: Vec<String> = (0..100).map(|id| format!("z{}", id % 4)).collect();
    let zones: Vec<&str> = zones.iter().map(String::as_str).collect();
    let mut view = cluster(&zones, 10_000, 3);
    view.nodes.push(node(101, "z0"));
    view.nodes[7].duty = Duty::Leaves;
    let made = plan(&view, &settings(3));
    assert!(made.stalls.is_empty() && made.after.replicas <= 1_010, "{:?}", made.after);
    assert!(made.copies() >= made.lower_bound && made.copies() < 2 * made.lower_bound);
    assert!(plan(&view.after(&made), &settings(3)).is_empty());
}
