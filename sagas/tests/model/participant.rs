//! The other service, as far as one saga and one step can see it.

/// What is asked of a participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What the contract asks for: it remembers what it has decided, and that somebody was erased. Then
    /// its commands may come twice and out of order, and a call may outlive the question it belonged to.
    Thorough,
    /// Knows only what is there now. It reads the commands once and in order.
    Forgetful,
}

/// Its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Participant {
    /// What the step makes is there.
    pub exists: bool,
    /// What it answered to the command.
    pub accepted: Option<bool>,
    /// What it answered to the undo command.
    pub undone: Option<bool>,
}

impl Participant {
    /// Carries the command out, or not: `willing` is its rules' word. Answers whether it is done.
    pub fn carry_out(&mut self, kind: Kind, willing: bool) -> bool {
        let done = match (kind, self.accepted) {
            (Kind::Thorough, Some(accepted)) => return accepted,
            (Kind::Thorough, None) => willing && self.undone != Some(true),
            (Kind::Forgetful, _) => willing || self.exists,
        };
        self.exists |= done;
        self.accepted = Some(done);
        done
    }

    /// Erases whatever the command did or will do, or refuses to. Answers whether it is undone.
    pub fn undo(&mut self, kind: Kind, willing: bool) -> bool {
        match (kind, self.undone) {
            (Kind::Thorough, Some(undone)) => undone,
            _ => {
                self.exists &= !willing;
                self.undone = Some(willing);
                willing
            }
        }
    }

    /// Somebody there has seen to it that a refused undo is done after all.
    pub fn undo_after_all(&mut self) {
        self.exists = false;
        self.undone = Some(true);
    }
}
