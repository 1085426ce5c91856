//! Structured control: blocks, branches and what lies beyond them.

use super::{Translator, reprs};
use crate::error::Error;
use crate::trap::Trap;
use crate::types::FuncType;
use cranelift_codegen::ir::types::I32;
use cranelift_codegen::ir::{Block, BlockArg, BlockCall, InstBuilder, JumpTableData, Type, Value};
use std::rc::Rc;
use wasmparser::{BlockType, Catch, Operator};

/// One open construct.
pub struct Frame {
    /// Where a branch to it goes.
    target: Block,
    /// Where its end goes on.
    follow: Block,
    /// Values that a branch to it carries.
    branch: usize,
    /// Values that its end leaves.
    results: usize,
    /// Operands below its own.
    height: usize,
    /// Something branches to `follow`.
    reached: bool,
    kind: Kind,
}

enum Kind {
    Block,
    Loop,
    /// With what it catches.
    Try(Rc<[Catch]>),
    /// Its other branch is still to come.
    If {
        otherwise: Block,
        params: Vec<Value>,
    },
    /// Opened in unreachable code.
    Dead,
}

pub(super) fn block_args(values: &[Value]) -> Vec<BlockArg> {
    values.iter().copied().map(BlockArg::from).collect()
}

impl Translator<'_, '_> {
    pub(super) fn enter_function(&mut self, ty: &FuncType) {
        let follow = self.block(&reprs(&ty.results));
        self.open(follow, follow, ty.results.len(), ty.results.len(), Kind::Block);
    }

    pub(super) fn block(&mut self, params: &[Type]) -> Block {
        let block = self.e.b.create_block();
        for ty in params {
            self.e.b.append_block_param(block, *ty);
        }
        block
    }

    fn open(&mut self, target: Block, follow: Block, branch: usize, results: usize, kind: Kind) {
        let height = self.stack.len();
        self.frames.push(Frame { target, follow, branch, results, height, reached: false, kind });
    }

    fn block_type(&self, ty: BlockType) -> Result<(Vec<Type>, Vec<Type>), Error> {
        Ok(match ty {
            BlockType::Empty => (vec![], vec![]),
            BlockType::Type(ty) => (vec![], vec![self.scope.module.val_type(ty)?.repr()]),
            BlockType::FuncType(index) => {
                let ty = self.func_type(self.scope.module.types[index as usize]);
                (reprs(&ty.params), reprs(&ty.results))
            }
        })
    }

    /// Translates a control operator; false if `op` is none.
    pub(super) fn control(&mut self, op: &Operator<'_>) -> Result<bool, Error> {
        match op {
            Operator::Unreachable => {
                self.e.b.ins().trap(Trap::Unreachable.cranelift());
                self.reachable = false;
            }
            Operator::Block { blockty } => {
                let (params, results) = self.block_type(*blockty)?;
                let follow = self.block(&results);
                let args = self.pop_many(params.len());
                self.open(follow, follow, results.len(), results.len(), Kind::Block);
                self.stack.extend(args);
            }
            Operator::TryTable { try_table } => {
                let (params, results) = self.block_type(try_table.ty)?;
                let follow = self.block(&results);
                let args = self.pop_many(params.len());
                self.open(follow, follow, results.len(), results.len(), Kind::Try(try_table.catches[..].into()));
                self.stack.extend(args);
            }
            Operator::Loop { blockty } => {
                let (params, results) = self.block_type(*blockty)?;
                let (head, follow) = (self.block(&params), self.block(&results));
                let args = self.pop_many(params.len());
                self.e.b.ins().jump(head, &block_args(&args));
                self.e.b.switch_to_block(head);
                self.open(head, follow, params.len(), results.len(), Kind::Loop);
                self.stack.extend_from_slice(self.e.b.block_params(head));
            }
            Operator::If { blockty } => {
                let (params, results) = self.block_type(*blockty)?;
                let condition = self.pop();
                let (then, otherwise, follow) = (self.block(&[]), self.block(&[]), self.block(&results));
                let args = self.pop_many(params.len());
                self.e.b.ins().brif(condition, then, &[], otherwise, &[]);
                for block in [then, otherwise] {
                    self.e.b.seal_block(block);
                }
                self.e.b.switch_to_block(then);
                let kind = Kind::If { otherwise, params: args.clone() };
                self.open(follow, follow, results.len(), results.len(), kind);
                self.stack.extend(args);
            }
            Operator::Else => self.otherwise(),
            Operator::End => self.end(),
            Operator::Br { relative_depth } => {
                let (target, count) = self.target(*relative_depth);
                let args = self.pop_many(count);
                self.e.b.ins().jump(target, &block_args(&args));
                self.reachable = false;
            }
            Operator::BrIf { relative_depth } => {
                let condition = self.pop();
                self.branch_if(condition, *relative_depth, true);
            }
            Operator::BrTable { targets } => {
                let index = self.pop();
                let default = self.target(targets.default());
                let args = block_args(&self.pop_many(default.1));
                let mut calls = Vec::with_capacity(targets.len() as usize);
                for depth in targets.targets() {
                    let (block, _) = self.target(depth?);
                    calls.push(self.block_call(block, &args));
                }
                // Cranelift 0.135 reaches the default by the table's indirect branch on arm64, yet gives a landing
                // pad (`bti j`) only to blocks that the table names: so the table names it too.
                calls.push(self.block_call(default.0, &args));
                let default = self.block_call(default.0, &args);
                let table = self.e.b.create_jump_table(JumpTableData::new(default, &calls));
                debug_assert_eq!(self.e.b.func.dfg.value_type(index), I32);
                self.e.b.ins().br_table(index, table);
                self.reachable = false;
            }
            Operator::Return => {
                let outermost = self.frames.len() as u32 - 1;
                let (target, count) = self.target(outermost);
                let args = self.pop_many(count);
                self.e.b.ins().jump(target, &block_args(&args));
                self.reachable = false;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn block_call(&mut self, block: Block, args: &[BlockArg]) -> BlockCall {
        BlockCall::new(block, args.iter().copied(), &mut self.e.b.func.dfg.value_lists)
    }

    /// The block that a branch of this depth goes to, and how many values it carries.
    pub(super) fn target(&mut self, depth: u32) -> (Block, usize) {
        let at = self.frames.len() - 1 - depth as usize;
        let frame = &mut self.frames[at];
        frame.reached |= !matches!(frame.kind, Kind::Loop);
        (frame.target, frame.branch)
    }

    /// Branches when `condition` is true (or false, if not `when`); the operands stay.
    pub(super) fn branch_if(&mut self, condition: Value, depth: u32, when: bool) {
        let (target, count) = self.target(depth);
        let args = block_args(&self.stack[self.stack.len() - count..]);
        let next = self.e.b.create_block();
        if when {
            self.e.b.ins().brif(condition, target, &args, next, &[]);
        } else {
            self.e.b.ins().brif(condition, next, &[], target, &args);
        }
        self.e.b.seal_block(next);
        self.e.b.switch_to_block(next);
    }

    /// Goes through an operator that is never executed, for the nesting's sake.
    pub(super) fn skipped(&mut self, op: &Operator<'_>) {
        match op {
            Operator::Block { .. } | Operator::Loop { .. } | Operator::If { .. } | Operator::TryTable { .. } => {
                let nowhere = self.frames[0].follow;
                self.open(nowhere, nowhere, 0, 0, Kind::Dead);
            }
            Operator::Else => self.otherwise(),
            Operator::End => self.end(),
            _ => {}
        }
    }

    /// What the open constructs catch, the innermost first, each with the number of constructs around it.
    pub(super) fn catches(&self) -> Vec<(usize, Rc<[Catch]>)> {
        let catches = self.frames.iter().enumerate().rev().filter_map(|(around, frame)| match &frame.kind {
            Kind::Try(catches) => Some((around, catches.clone())),
            _ => None,
        });
        catches.collect()
    }

    fn otherwise(&mut self) {
        let last = self.frames.len() - 1;
        if matches!(self.frames[last].kind, Kind::Dead) {
            return;
        }
        self.close_branch(last);
        let frame = &mut self.frames[last];
        let Kind::If { otherwise, params } = std::mem::replace(&mut frame.kind, Kind::Block) else {
            unreachable!("a validated `else` follows an `if`");
        };
        self.stack.extend(params);
        self.e.b.switch_to_block(otherwise);
        self.reachable = true;
    }

    /// Ends the present branch of a frame: its results go to what follows.
    fn close_branch(&mut self, at: usize) {
        if self.reachable {
            let args = block_args(&self.pop_many(self.frames[at].results));
            self.e.b.ins().jump(self.frames[at].follow, &args);
            self.frames[at].reached = true;
        }
        self.stack.truncate(self.frames[at].height);
    }

    fn end(&mut self) {
        let last = self.frames.len() - 1;
        if matches!(self.frames[last].kind, Kind::Dead) {
            self.frames.pop();
            return;
        }
        if let Kind::If { .. } = self.frames[last].kind {
            // An `if` without `else`: its parameters are its results.
            self.otherwise();
        }
        self.close_branch(last);
        let frame = self.frames.pop().expect("the frame just closed");
        if let Kind::Loop = frame.kind {
            self.e.b.seal_block(frame.target);
        }
        self.e.b.seal_block(frame.follow);
        self.reachable = frame.reached;
        if frame.reached {
            self.e.b.switch_to_block(frame.follow);
            let values = self.e.b.block_params(frame.follow).to_vec();
            if self.frames.is_empty() {
                self.e.ret(&values);
            } else {
                self.stack.extend(values);
            }
        }
    }
}
