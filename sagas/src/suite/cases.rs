//! What happens in which case. What must hold after each is in [`Play::rest`], and after each word
//! in [`Play::say`].

use super::{
    Subject, Verdict,
    difference::difference,
    ensure,
    play::{Naming, Play, REFUSAL, Say},
    stage::Stage,
};
use crate::{
    definition::{Definition, Undo},
    orchestrator::Flows,
    state::{Evidence, Status},
};

mod silence;

/// Beyond this length not all orders are gone through: each message then comes first once.
const ALL_ORDERS: usize = 4;

/// Every case, each on a saga of its own.
pub(super) async fn all<F: Flows, S: Subject>(stage: &mut Stage<F, S>) {
    completion(stage).await;
    for step in 0..stage.definition.steps.len() {
        refusal(stage, step).await;
        undos(stage, step).await;
        silence::all(stage, step).await;
        words_in_every_order(stage, step).await;
    }
}

async fn completion<F: Flows, S: Subject>(stage: &mut Stage<F, S>) {
    let last = stage.definition.steps.len() - 1;
    for (naming, how) in namings(stage.definition) {
        let case = format!("completes, its replies naming it by {how}");
        let act = async |play: &mut Play<'_, F, S>| {
            play.naming = naming;
            completed(play, last).await
        };
        stage.play(None, case, act).await;
    }
    let act = async |play: &mut Play<'_, F, S>| {
        play.repeats = true;
        completed(play, last).await
    };
    stage.play(None, "completes with every message coming again", act).await;
    let act = async |play: &mut Play<'_, F, S>| {
        play.up_to(last).await?;
        play.say_in_a_storm(Say::Done(last)).await?;
        play.expect(Status::Completed).await.map(drop)
    };
    stage.play(None, "completes although the database fails in the middle", act).await;
    let act = async |play: &mut Play<'_, F, S>| {
        completed(play, last).await?;
        nothing_changes(play, every_word(play.definition())).await
    };
    stage.play(None, "late words after it has completed", act).await;
}

async fn completed<F: Flows, S: Subject>(play: &mut Play<'_, F, S>, last: usize) -> Verdict {
    play.up_to(last).await?;
    play.say(Say::Done(last)).await?;
    play.expect(Status::Completed).await.map(drop)
}

async fn refusal<F: Flows, S: Subject>(stage: &mut Stage<F, S>, step: usize) {
    for (naming, how) in namings(stage.definition) {
        let case = format!("refused, the refusal naming it by {how}");
        let act = async |play: &mut Play<'_, F, S>| {
            play.naming = naming;
            refused(play, step).await
        };
        stage.play(Some(step), case, act).await;
    }
    let act = async |play: &mut Play<'_, F, S>| {
        play.repeats = true;
        refused(play, step).await
    };
    stage.play(Some(step), "refused with every message coming again", act).await;
    let act = async |play: &mut Play<'_, F, S>| {
        play.up_to(step).await?;
        play.say_in_a_storm(Say::Refused(step)).await?;
        play.expect(Status::Compensated).await.map(drop)
    };
    stage.play(Some(step), "refused, and the database fails in the middle", act).await;
    let act = async |play: &mut Play<'_, F, S>| {
        refused(play, step).await?;
        let late = every_word(play.definition()).into_iter().filter(|word| match word {
            // An undo that was sent may be refused: see `undos`. One that never was may not.
            Say::UndoRefused(of) => *of > step,
            _ => true,
        });
        nothing_changes(play, late.collect()).await
    };
    stage.play(Some(step), "late words after it was refused", act).await;
}

async fn refused<F: Flows, S: Subject>(play: &mut Play<'_, F, S>, step: usize) -> Verdict {
    play.up_to(step).await?;
    play.say(Say::Refused(step)).await?;
    let saga = play.expect(Status::Compensated).await?;
    ensure(saga.evidence.as_deref() == Some(Evidence::Reply.as_str()), || {
        format!("a reply took it back, and its evidence is {:?}", saga.evidence)
    })
}

/// The undos' replies, in every order: stuck as long as one is refused, healed when none is.
async fn undos<F: Flows, S: Subject>(stage: &mut Stage<F, S>, step: usize) {
    let undoable = undoable(stage.definition, step);
    let words: Vec<Say> = undoable.iter().flat_map(|&of| [Say::UndoRefused(of), Say::Undone(of)]).collect();
    for words in orders(&words) {
        let case = format!("refused, and then comes {words:?}");
        let act = async |play: &mut Play<'_, F, S>| {
            refused(play, step).await?;
            for word in words {
                play.say(word).await?;
            }
            Ok(())
        };
        stage.play(Some(step), case, act).await;
    }
    for of in undoable {
        let case = format!("refused, and the undo of step {} too", stage.definition.steps[of].name);
        let act = async |play: &mut Play<'_, F, S>| {
            play.repeats = true;
            refused(play, step).await?;
            play.say(Say::UndoRefused(of)).await?;
            let why = play.expect(Status::Stuck).await?.stuck_reason.unwrap_or_default();
            ensure(why.contains(REFUSAL), || format!("it is stuck because of {why:?}; the service said {REFUSAL:?}"))?;
            // Nothing the steps themselves say, and no other undo, makes up for it.
            let others = every_word(play.definition()).into_iter().filter(|word| match word {
                Say::Undone(undone) => *undone != of,
                Say::UndoRefused(refusing) => *refusing == of || *refusing > step,
                Say::Done(_) | Say::Refused(_) => true,
            });
            nothing_changes(play, others.collect()).await?;
            play.say(Say::Undone(of)).await?;
            play.expect(Status::Compensated).await.map(drop)
        };
        stage.play(Some(step), case, act).await;
    }
}

/// Words that contradict each other, are late, or are early, in every order.
async fn words_in_every_order<F: Flows, S: Subject>(stage: &mut Stage<F, S>, step: usize) {
    if let Some(before) = step.checked_sub(1) {
        let act = async |play: &mut Play<'_, F, S>| {
            play.up_to(step).await?;
            nothing_changes(play, vec![Say::Done(before), Say::Refused(before)]).await
        };
        stage.play(Some(step), "words about the step before", act).await;
    }
    let mut words = vec![Say::Done(step), Say::Refused(step)];
    if undoable(stage.definition, step).contains(&step) {
        words.extend([Say::Undone(step), Say::UndoRefused(step)]);
    }
    for words in orders(&words) {
        let case = format!("these come: {words:?}");
        let act = async |play: &mut Play<'_, F, S>| {
            play.up_to(step).await?;
            for word in words {
                play.say(word).await?;
            }
            Ok(())
        };
        stage.play(Some(step), case, act).await;
    }
}

async fn nothing_changes<F: Flows, S: Subject>(play: &mut Play<'_, F, S>, words: Vec<Say>) -> Verdict {
    let (before, commands) = (play.picture().await?, play.remote.count());
    for word in words {
        play.say(word).await?;
        let after = play.picture().await?;
        ensure(after == before && play.remote.count() == commands, || {
            let changed = difference(&before, &after);
            format!("{word:?} should have no effect any more, and changed {changed} (or had a command sent)")
        })?;
    }
    Ok(())
}

fn namings(definition: &Definition) -> Vec<(Naming, &'static str)> {
    let mut namings = vec![
        (Naming::Header, "the saga-id header"),
        (Naming::Value, "sagaId in the value"),
        (Naming::CorrelationId, "the correlationId header"),
    ];
    if definition.steps.iter().any(|step| step.either.is_some()) {
        namings.push((Naming::Original, "the correlationId header, as the original fleet does"));
    }
    namings
}

/// Whatever other services could say about any step.
fn every_word(definition: &Definition) -> Vec<Say> {
    let steps = 0..definition.steps.len();
    let undoable = undoable(definition, definition.steps.len() - 1);
    let of_steps = steps.flat_map(|step| [Say::Done(step), Say::Refused(step)]);
    let of_undos = undoable.into_iter().flat_map(|step| [Say::Undone(step), Say::UndoRefused(step)]);
    of_steps.chain(of_undos).collect()
}

/// The steps up to this one that have an undo command.
fn undoable(definition: &Definition, last: usize) -> Vec<usize> {
    (0..=last).filter(|&step| matches!(definition.steps[step].undo, Undo::Command { .. })).collect()
}

/// The words in every order, or, if they are many, with each of them first once.
fn orders(words: &[Say]) -> Vec<Vec<Say>> {
    if words.len() > ALL_ORDERS {
        return (0..words.len()).map(|first| [&words[first..], &words[..first]].concat()).collect();
    }
    let Some((first, others)) = words.split_first() else { return vec![vec![]] };
    let with_first_at = |order: Vec<Say>| {
        (0..=order.len()).map(move |at| {
            let mut order = order.clone();
            order.insert(at, *first);
            order
        })
    };
    orders(others).into_iter().flat_map(with_first_at).collect()
}
