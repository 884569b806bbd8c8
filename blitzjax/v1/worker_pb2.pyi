from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerCommand(_message.Message):
    __slots__ = ("configure", "assign", "abort", "load_from_disk", "prepare_transfer", "start_transfer", "cancel_transfer", "start_live", "end_live", "release", "pull", "taken", "partner", "loan", "migrate", "kv_offer", "keep_copy", "use_copy", "drop_copy", "deploy", "undeploy", "inspect", "fetch_executable", "fetch_tokenizer", "received")
    CONFIGURE_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FROM_DISK_FIELD_NUMBER: _ClassVar[int]
    PREPARE_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    START_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    CANCEL_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    START_LIVE_FIELD_NUMBER: _ClassVar[int]
    END_LIVE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    PARTNER_FIELD_NUMBER: _ClassVar[int]
    LOAN_FIELD_NUMBER: _ClassVar[int]
    MIGRATE_FIELD_NUMBER: _ClassVar[int]
    KV_OFFER_FIELD_NUMBER: _ClassVar[int]
    KEEP_COPY_FIELD_NUMBER: _ClassVar[int]
    USE_COPY_FIELD_NUMBER: _ClassVar[int]
    DROP_COPY_FIELD_NUMBER: _ClassVar[int]
    DEPLOY_FIELD_NUMBER: _ClassVar[int]
    UNDEPLOY_FIELD_NUMBER: _ClassVar[int]
    INSPECT_FIELD_NUMBER: _ClassVar[int]
    FETCH_EXECUTABLE_FIELD_NUMBER: _ClassVar[int]
    FETCH_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    configure: Configure
    assign: Assign
    abort: Abort
    load_from_disk: LoadFromDisk
    prepare_transfer: PrepareTransfer
    start_transfer: StartTransfer
    cancel_transfer: CancelTransfer
    start_live: StartLive
    end_live: EndLive
    release: Release
    pull: Pull
    taken: Taken
    partner: Partner
    loan: Loan
    migrate: Migrate
    kv_offer: KVOffer
    keep_copy: KeepCopy
    use_copy: UseCopy
    drop_copy: DropCopy
    deploy: Model
    undeploy: Undeploy
    inspect: Inspect
    fetch_executable: FetchExecutable
    fetch_tokenizer: FetchTokenizer
    received: int
    def __init__(self, configure: _Optional[_Union[Configure, _Mapping]] = ..., assign: _Optional[_Union[Assign, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., load_from_disk: _Optional[_Union[LoadFromDisk, _Mapping]] = ..., prepare_transfer: _Optional[_Union[PrepareTransfer, _Mapping]] = ..., start_transfer: _Optional[_Union[StartTransfer, _Mapping]] = ..., cancel_transfer: _Optional[_Union[CancelTransfer, _Mapping]] = ..., start_live: _Optional[_Union[StartLive, _Mapping]] = ..., end_live: _Optional[_Union[EndLive, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., pull: _Optional[_Union[Pull, _Mapping]] = ..., taken: _Optional[_Union[Taken, _Mapping]] = ..., partner: _Optional[_Union[Partner, _Mapping]] = ..., loan: _Optional[_Union[Loan, _Mapping]] = ..., migrate: _Optional[_Union[Migrate, _Mapping]] = ..., kv_offer: _Optional[_Union[KVOffer, _Mapping]] = ..., keep_copy: _Optional[_Union[KeepCopy, _Mapping]] = ..., use_copy: _Optional[_Union[UseCopy, _Mapping]] = ..., drop_copy: _Optional[_Union[DropCopy, _Mapping]] = ..., deploy: _Optional[_Union[Model, _Mapping]] = ..., undeploy: _Optional[_Union[Undeploy, _Mapping]] = ..., inspect: _Optional[_Union[Inspect, _Mapping]] = ..., fetch_executable: _Optional[_Union[FetchExecutable, _Mapping]] = ..., fetch_tokenizer: _Optional[_Union[FetchTokenizer, _Mapping]] = ..., received: _Optional[int] = ...) -> None: ...

class WorkerEvent(_message.Message):
    __slots__ = ("instance_joined", "world_joined", "tokens", "prefill_done", "request_handed", "request_finished", "request_failed", "layer_loaded", "transfer_ready", "transfer_ended", "live_drained", "drained", "hand_off", "refused", "borrow", "request_returned", "k_v_migrated", "kv_answer", "model_ready", "holdings", "fetched", "decoded", "resumed", "taken")
    INSTANCE_JOINED_FIELD_NUMBER: _ClassVar[int]
    WORLD_JOINED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DONE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_HANDED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FINISHED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FAILED_FIELD_NUMBER: _ClassVar[int]
    LAYER_LOADED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_READY_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ENDED_FIELD_NUMBER: _ClassVar[int]
    LIVE_DRAINED_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    BORROW_FIELD_NUMBER: _ClassVar[int]
    REQUEST_RETURNED_FIELD_NUMBER: _ClassVar[int]
    K_V_MIGRATED_FIELD_NUMBER: _ClassVar[int]
    KV_ANSWER_FIELD_NUMBER: _ClassVar[int]
    MODEL_READY_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    DECODED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    instance_joined: InstanceJoined
    world_joined: WorldJoined
    tokens: Tokens
    prefill_done: PrefillDone
    request_handed: RequestHanded
    request_finished: RequestFinished
    request_failed: RequestFailed
    layer_loaded: LayerLoaded
    transfer_ready: TransferReady
    transfer_ended: TransferEnded
    live_drained: LiveDrained
    drained: Drained
    hand_off: HandOff
    refused: Refused
    borrow: Borrow
    request_returned: RequestReturned
    k_v_migrated: KVMigrated
    kv_answer: KVAnswer
    model_ready: ModelReady
    holdings: Holdings
    fetched: Fetched
    decoded: Decoded
    resumed: Resumed
    taken: int
    def __init__(self, instance_joined: _Optional[_Union[InstanceJoined, _Mapping]] = ..., world_joined: _Optional[_Union[WorldJoined, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., prefill_done: _Optional[_Union[PrefillDone, _Mapping]] = ..., request_handed: _Optional[_Union[RequestHanded, _Mapping]] = ..., request_finished: _Optional[_Union[RequestFinished, _Mapping]] = ..., request_failed: _Optional[_Union[RequestFailed, _Mapping]] = ..., layer_loaded: _Optional[_Union[LayerLoaded, _Mapping]] = ..., transfer_ready: _Optional[_Union[TransferReady, _Mapping]] = ..., transfer_ended: _Optional[_Union[TransferEnded, _Mapping]] = ..., live_drained: _Optional[_Union[LiveDrained, _Mapping]] = ..., drained: _Optional[_Union[Drained, _Mapping]] = ..., hand_off: _Optional[_Union[HandOff, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., borrow: _Optional[_Union[Borrow, _Mapping]] = ..., request_returned: _Optional[_Union[RequestReturned, _Mapping]] = ..., k_v_migrated: _Optional[_Union[KVMigrated, _Mapping]] = ..., kv_answer: _Optional[_Union[KVAnswer, _Mapping]] = ..., model_ready: _Optional[_Union[ModelReady, _Mapping]] = ..., holdings: _Optional[_Union[Holdings, _Mapping]] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ..., decoded: _Optional[_Union[Decoded, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ..., taken: _Optional[int] = ...) -> None: ...

class Configure(_message.Message):
    __slots__ = ("instance", "models", "config_json", "peers", "session", "resume", "received", "since")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    models: _containers.RepeatedCompositeFieldContainer[Model]
    config_json: str
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    session: str
    resume: bool
    received: int
    since: float
    def __init__(self, instance: _Optional[str] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., config_json: _Optional[str] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., session: _Optional[str] = ..., resume: bool = ..., received: _Optional[int] = ..., since: _Optional[float] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("taken",)
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    taken: int
    def __init__(self, taken: _Optional[int] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("model_json", "checkpoint")
    MODEL_JSON_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    model_json: str
    checkpoint: str
    def __init__(self, model_json: _Optional[str] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class Undeploy(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Inspect(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Holdings(_message.Message):
    __slots__ = ("holdings",)
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    def __init__(self, holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("model", "units", "bytes", "copy")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    model: str
    units: int
    bytes: int
    copy: bool
    def __init__(self, model: _Optional[str] = ..., units: _Optional[int] = ..., bytes: _Optional[int] = ..., copy: bool = ...) -> None: ...

class FetchExecutable(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class FetchTokenizer(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Fetched(_message.Message):
    __slots__ = ("content",)
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    def __init__(self, content: _Optional[bytes] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("instance", "address", "rank")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    instance: str
    address: str
    rank: int
    def __init__(self, instance: _Optional[str] = ..., address: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "model", "prompt_tokens", "max_tokens", "arrival_s", "priority", "beginnings")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    BEGINNINGS_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    prompt_tokens: int
    max_tokens: int
    arrival_s: float
    priority: int
    beginnings: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., arrival_s: _Optional[float] = ..., priority: _Optional[int] = ..., beginnings: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "logprobs", "prompt_logprobs", "grammar")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    min_tokens: int
    logprobs: int
    prompt_logprobs: int
    grammar: str
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., min_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., grammar: _Optional[str] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("request", "attempt", "prompt", "generated", "sampling")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    request: Request
    attempt: int
    prompt: _containers.RepeatedScalarFieldContainer[int]
    generated: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., attempt: _Optional[int] = ..., prompt: _Optional[_Iterable[int]] = ..., generated: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class Assign(_message.Message):
    __slots__ = ("work",)
    WORK_FIELD_NUMBER: _ClassVar[int]
    work: Work
    def __init__(self, work: _Optional[_Union[Work, _Mapping]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class LoadFromDisk(_message.Message):
    __slots__ = ("ticket", "start_unit", "model")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    START_UNIT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    start_unit: int
    model: str
    def __init__(self, ticket: _Optional[int] = ..., start_unit: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class KeepCopy(_message.Message):
    __slots__ = ("ticket", "model")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    model: str
    def __init__(self, ticket: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class UseCopy(_message.Message):
    __slots__ = ("ticket", "model")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    model: str
    def __init__(self, ticket: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class DropCopy(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Chain(_message.Message):
    __slots__ = ("instances", "start_unit", "stop_unit", "generation", "lane", "lanes")
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    START_UNIT_FIELD_NUMBER: _ClassVar[int]
    STOP_UNIT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedScalarFieldContainer[str]
    start_unit: int
    stop_unit: int
    generation: int
    lane: int
    lanes: int
    def __init__(self, instances: _Optional[_Iterable[str]] = ..., start_unit: _Optional[int] = ..., stop_unit: _Optional[int] = ..., generation: _Optional[int] = ..., lane: _Optional[int] = ..., lanes: _Optional[int] = ...) -> None: ...

class Ring(_message.Message):
    __slots__ = ("instances", "generation")
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedScalarFieldContainer[str]
    generation: int
    def __init__(self, instances: _Optional[_Iterable[str]] = ..., generation: _Optional[int] = ...) -> None: ...

class MulticastPlan(_message.Message):
    __slots__ = ("ticket", "model", "chains", "rings", "copy")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    RINGS_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    model: str
    chains: _containers.RepeatedCompositeFieldContainer[Chain]
    rings: _containers.RepeatedCompositeFieldContainer[Ring]
    copy: bool
    def __init__(self, ticket: _Optional[int] = ..., model: _Optional[str] = ..., chains: _Optional[_Iterable[_Union[Chain, _Mapping]]] = ..., rings: _Optional[_Iterable[_Union[Ring, _Mapping]]] = ..., copy: bool = ...) -> None: ...

class PrepareTransfer(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: MulticastPlan
    def __init__(self, plan: _Optional[_Union[MulticastPlan, _Mapping]] = ...) -> None: ...

class StartTransfer(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    def __init__(self, ticket: _Optional[int] = ...) -> None: ...

class CancelTransfer(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    def __init__(self, ticket: _Optional[int] = ...) -> None: ...

class LivePair(_message.Message):
    __slots__ = ("old", "new", "mode")
    OLD_FIELD_NUMBER: _ClassVar[int]
    NEW_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    old: str
    new: str
    mode: str
    def __init__(self, old: _Optional[str] = ..., new: _Optional[str] = ..., mode: _Optional[str] = ...) -> None: ...

class StartLive(_message.Message):
    __slots__ = ("pair",)
    PAIR_FIELD_NUMBER: _ClassVar[int]
    pair: LivePair
    def __init__(self, pair: _Optional[_Union[LivePair, _Mapping]] = ...) -> None: ...

class EndLive(_message.Message):
    __slots__ = ("pair",)
    PAIR_FIELD_NUMBER: _ClassVar[int]
    pair: LivePair
    def __init__(self, pair: _Optional[_Union[LivePair, _Mapping]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("keep",)
    KEEP_FIELD_NUMBER: _ClassVar[int]
    keep: bool
    def __init__(self, keep: bool = ...) -> None: ...

class Migrate(_message.Message):
    __slots__ = ("request_id", "attempt", "target")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    target: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., target: _Optional[str] = ...) -> None: ...

class Partner(_message.Message):
    __slots__ = ("instance", "model")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    instance: str
    model: str
    def __init__(self, instance: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class Pull(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class Borrow(_message.Message):
    __slots__ = ("request_id", "attempt", "tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Loan(_message.Message):
    __slots__ = ("request_id", "attempt", "dtype", "rows")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    dtype: str
    rows: bytes
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., dtype: _Optional[str] = ..., rows: _Optional[bytes] = ...) -> None: ...

class Taken(_message.Message):
    __slots__ = ("seq",)
    SEQ_FIELD_NUMBER: _ClassVar[int]
    seq: int
    def __init__(self, seq: _Optional[int] = ...) -> None: ...

class HandOff(_message.Message):
    __slots__ = ("seq", "work", "next_layer", "address", "activation_uuid", "kv_uuids", "drained", "layout")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    NEXT_LAYER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_UUID_FIELD_NUMBER: _ClassVar[int]
    KV_UUIDS_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    seq: int
    work: Work
    next_layer: int
    address: str
    activation_uuid: int
    kv_uuids: _containers.RepeatedScalarFieldContainer[int]
    drained: bool
    layout: str
    def __init__(self, seq: _Optional[int] = ..., work: _Optional[_Union[Work, _Mapping]] = ..., next_layer: _Optional[int] = ..., address: _Optional[str] = ..., activation_uuid: _Optional[int] = ..., kv_uuids: _Optional[_Iterable[int]] = ..., drained: bool = ..., layout: _Optional[str] = ...) -> None: ...

class KVOffer(_message.Message):
    __slots__ = ("work", "said", "pieces")
    WORK_FIELD_NUMBER: _ClassVar[int]
    SAID_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    work: Work
    said: Tokens
    pieces: _containers.RepeatedCompositeFieldContainer[KVPiece]
    def __init__(self, work: _Optional[_Union[Work, _Mapping]] = ..., said: _Optional[_Union[Tokens, _Mapping]] = ..., pieces: _Optional[_Iterable[_Union[KVPiece, _Mapping]]] = ...) -> None: ...

class KVPiece(_message.Message):
    __slots__ = ("address", "uuid", "start", "stop", "width", "layout")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    address: str
    uuid: int
    start: int
    stop: int
    width: int
    layout: str
    def __init__(self, address: _Optional[str] = ..., uuid: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., width: _Optional[int] = ..., layout: _Optional[str] = ...) -> None: ...

class KVAnswer(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("request_id", "attempt", "start", "token_ids", "finish_reason", "layers_helped", "logprobs", "prompt_logprobs", "cached_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LAYERS_HELPED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    layers_helped: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    cached_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ..., layers_helped: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Decoded(_message.Message):
    __slots__ = ("request_ids", "attempts", "starts", "token_ids")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ..., attempts: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("logprob", "rank", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class InstanceJoined(_message.Message):
    __slots__ = ("at", "instance", "incarnation", "host", "units", "pages", "page_size", "slots", "model", "models", "copies", "generation", "leaf")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LEAF_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    incarnation: str
    host: str
    units: int
    pages: int
    page_size: int
    slots: int
    model: str
    models: _containers.RepeatedScalarFieldContainer[str]
    copies: _containers.RepeatedScalarFieldContainer[str]
    generation: int
    leaf: str
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., incarnation: _Optional[str] = ..., host: _Optional[str] = ..., units: _Optional[int] = ..., pages: _Optional[int] = ..., page_size: _Optional[int] = ..., slots: _Optional[int] = ..., model: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., copies: _Optional[_Iterable[str]] = ..., generation: _Optional[int] = ..., leaf: _Optional[str] = ...) -> None: ...

class ModelReady(_message.Message):
    __slots__ = ("at", "instance", "model")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    model: str
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class WorldJoined(_message.Message):
    __slots__ = ("at", "instance")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("at", "instance", "request_id", "attempt")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    request_id: str
    attempt: int
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class RequestHanded(_message.Message):
    __slots__ = ("at", "instance", "request_id", "attempt", "target")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    request_id: str
    attempt: int
    target: str
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., target: _Optional[str] = ...) -> None: ...

class RequestFinished(_message.Message):
    __slots__ = ("at", "instance", "request_id", "attempt", "reason")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    request_id: str
    attempt: int
    reason: str
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class RequestFailed(_message.Message):
    __slots__ = ("at", "instance", "request_id", "attempt", "message")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    request_id: str
    attempt: int
    message: str
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class RequestReturned(_message.Message):
    __slots__ = ("at", "instance", "request_id", "attempt")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    request_id: str
    attempt: int
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class LayerLoaded(_message.Message):
    __slots__ = ("at", "instance", "units")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    units: int
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., units: _Optional[int] = ...) -> None: ...

class TransferReady(_message.Message):
    __slots__ = ("at", "instance", "ticket")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    ticket: int
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., ticket: _Optional[int] = ...) -> None: ...

class TransferEnded(_message.Message):
    __slots__ = ("at", "instance", "ticket", "units", "error")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    ticket: int
    units: int
    error: str
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., ticket: _Optional[int] = ..., units: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class LiveDrained(_message.Message):
    __slots__ = ("at", "instance")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ...) -> None: ...

class KVMigrated(_message.Message):
    __slots__ = ("at", "instance", "request_id", "attempt", "kv_bytes")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    request_id: str
    attempt: int
    kv_bytes: int
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., kv_bytes: _Optional[int] = ...) -> None: ...

class Drained(_message.Message):
    __slots__ = ("at", "instance")
    AT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    at: float
    instance: str
    def __init__(self, at: _Optional[float] = ..., instance: _Optional[str] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("instance", "message", "model")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    instance: str
    message: str
    model: str
    def __init__(self, instance: _Optional[str] = ..., message: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...
