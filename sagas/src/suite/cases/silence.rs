//! Nothing is heard: what is asked, what is answered, and what comes meanwhile.

use crate::{
    machine::{Recourse, Settlement},
    orchestrator::Flows,
    state::Status,
    suite::{
        Subject, Verdict,
        difference::difference,
        ensure,
        play::{Play, Say},
        stage::{QUESTIONS, Stage},
    },
};

/// A step's command gets no reply in time.
pub(super) async fn all<F: Flows, S: Subject>(stage: &mut Stage<F, S>, step: usize) {
    let reason = || "the suite says so".to_owned();
    let act = async |play: &mut Play<'_, F, S>| {
        if let Some(before) = step.checked_sub(1) {
            play.up_to(before).await?;
            let asker = play.silence().await?;
            play.answer(asker, Settlement::NoAnswer(reason())).await?;
            play.say_undelivered(Say::Done(before)).await?;
        }
        play.sweep(Recourse::Ask).await?;
        play.expect(Status::Running).await?;
        // Once it is out, the clock and the questions begin anew.
        let asker = play.silence().await?;
        play.answer(asker, Settlement::NoAnswer(reason())).await?;
        play.expect(Status::Running).await.map(drop)
    };
    stage.play(Some(step), "time passes while the command is not out", act).await;

    let answers = [
        Settlement::AlreadyDone,
        Settlement::DoneNow,
        Settlement::Refused(reason()),
        Settlement::Ambiguous(reason()),
        Settlement::NoAnswer(reason()),
    ];
    for answer in answers {
        let case = format!("silence; asked, the service says {answer:?}");
        let act = async |play: &mut Play<'_, F, S>| {
            play.up_to(step).await?;
            let asker = play.silence().await?;
            play.answer(asker, answer.clone()).await?;
            settled(play, step, &answer).await
        };
        stage.play(Some(step), case, act).await;
        for word in [Say::Done(step), Say::Refused(step)] {
            let case = format!("silence; asked, the service says {answer:?}, and meanwhile comes {word:?}");
            let act = async |play: &mut Play<'_, F, S>| {
                play.up_to(step).await?;
                let asker = play.silence().await?;
                let before = play.picture().await?;
                play.say(word).await?;
                let after = play.picture().await?;
                ensure(after == before, || {
                    format!("a reply did not wait, and changed {}", difference(&before, &after))
                })?;
                play.answer(asker, answer.clone()).await?;
                match answer {
                    // Who was asked knew nothing: what waited decides.
                    Settlement::NoAnswer(_) | Settlement::Ambiguous(_) => answered(play, step, word).await,
                    _ => settled(play, step, &answer).await,
                }
            };
            stage.play(Some(step), case, act).await;
        }
    }

    for word in [Say::Done(step), Say::Refused(step)] {
        let case = format!("silence; nobody answers however often it is asked, then comes {word:?}");
        let act = async |play: &mut Play<'_, F, S>| {
            play.up_to(step).await?;
            for _ in 0..QUESTIONS {
                play.expect(Status::Running).await?;
                let asker = play.silence().await?;
                play.answer(asker, Settlement::NoAnswer(reason())).await?;
            }
            play.expect(Status::Stuck).await?;
            play.say(word).await?;
            answered(play, step, word).await
        };
        stage.play(Some(step), case, act).await;

        let case = format!("silence; there is nobody to ask, then comes {word:?}");
        let act = async |play: &mut Play<'_, F, S>| {
            play.up_to(step).await?;
            play.sweep(Recourse::NeedsOperator).await?;
            play.expect(Status::Stuck).await?;
            play.say(word).await?;
            answered(play, step, word).await
        };
        stage.play(Some(step), case, act).await;
    }

    let act = async |play: &mut Play<'_, F, S>| {
        play.up_to(step).await?;
        play.sweep(Recourse::AssumeCompleted).await?;
        settled(play, step, &Settlement::AlreadyDone).await
    };
    stage.play(Some(step), "silence; there is nobody to ask, and it counts as success", act).await;

    let act = async |play: &mut Play<'_, F, S>| {
        play.up_to(step).await?;
        let first = play.silence().await?;
        play.dies(first).await;
        play.expect(Status::Resolving).await?;
        let second = play.silence().await?;
        play.answer(second, Settlement::DoneNow).await?;
        settled(play, step, &Settlement::DoneNow).await
    };
    stage.play(Some(step), "silence; whoever asks dies, and somebody else asks", act).await;
}

/// Where a reply leads.
async fn answered<F: Flows, S: Subject>(play: &mut Play<'_, F, S>, step: usize, word: Say) -> Verdict {
    let as_settled = match word {
        Say::Done(_) => Settlement::AlreadyDone,
        _ => Settlement::Refused(String::new()),
    };
    settled(play, step, &as_settled).await
}

/// Where an answer about silence leads.
async fn settled<F: Flows, S: Subject>(play: &mut Play<'_, F, S>, step: usize, answer: &Settlement) -> Verdict {
    let steps = play.definition().steps;
    let (status, at) = match answer {
        Settlement::AlreadyDone | Settlement::DoneNow if step + 1 < steps.len() => (Status::Running, step + 1),
        Settlement::AlreadyDone | Settlement::DoneNow => (Status::Completed, step),
        Settlement::Refused(_) => (Status::Compensated, step),
        Settlement::NoAnswer(_) => (Status::Running, step),
        Settlement::Ambiguous(_) | Settlement::GaveUp(_) => (Status::Stuck, step),
    };
    let saga = play.expect(status).await?;
    ensure(saga.step == steps[at].name, || format!("it is at step {}, it should be at {}", saga.step, steps[at].name))?;
    match answer {
        // The answer it waits for settles it at last.
        Settlement::Ambiguous(_) => play.say(Say::Done(step)).await,
        _ => Ok(()),
    }
}
